"""HierarchicalVLA: levels apart, subgoals held, and skills found where only their order was told."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from vla_dist.core.errors import ConfigError, DataError, NotFound
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Observation
from vla_dist.models.batch import TrainBatch
from vla_dist.models.conditioning import ReturnConditioning
from vla_dist.models.hierarchical.config import HierarchicalVLAConfig
from vla_dist.models.hierarchical.hierarchical_vla import HierarchicalVLA
from vla_dist.models.hierarchical.policy import HierarchicalPolicy
from vla_dist.models.zoo import architecture
from vla_dist.testing.fakes import make_spec
from vla_dist.testing.windows import make_train_batch

SPEC = make_spec(proprio_dim=3, action_dim=2)
SKILLS = ("left", "right")
"""Action (-0.8, 0) and (0.8, 0): in the worlds below the state does not tell which is wanted, but for dimension 0."""


def configure(**changes) -> HierarchicalVLAConfig:
    return architecture("hierarchical").configure("tiny", SPEC, **{"goal_dim": 0, **changes})


def make_policy(model: HierarchicalVLA, spec: EnvSpec = SPEC, **changes) -> HierarchicalPolicy:
    return HierarchicalPolicy(model, spec, conditioning=ReturnConditioning(), goals=None, **changes)


def observe(*proprio: float, words: str = "") -> Observation:
    return Observation(proprio=np.array(proprio, np.float32), instruction=words)


def composed_batch(config: HierarchicalVLAConfig, count: int, generator: torch.Generator) -> TrainBatch:
    """Episodes of "left then right", "right then left" and of either alone; the state tells the phase alone."""
    steps = config.context_steps
    batch = make_train_batch(config, num_windows=count)
    change = torch.randint(2, steps - 1, (count,), generator=generator)
    sketches = ("left, then right", "right, then left", "left", "right")
    words = tuple(sketches[row % 4] for row in range(count))
    is_second = torch.arange(steps) >= change[:, None]
    starts_left = torch.tensor([text.startswith("left") for text in words])
    is_composed = torch.tensor([", then" in text for text in words])
    is_left = torch.where(is_composed[:, None], is_second ^ starts_left[:, None], starts_left[:, None])
    states = torch.zeros(count, steps, 3)
    states[..., 0] = (is_second & is_composed[:, None]).float()
    states[..., 1] = starts_left[:, None].float()
    states[..., 2] = torch.randn(count, steps, generator=generator)
    targets = torch.zeros(count, steps, 2)
    targets[..., 0] = torch.where(is_left, -0.8, 0.8)
    return replace(
        batch,
        states=states,
        target_actions=targets,
        padding_mask=torch.ones(count, steps, dtype=torch.bool),
        timesteps=torch.arange(steps).repeat(count, 1),
        tasks=("mixed",) * count,
        instructions=words,
    )


def train(model: HierarchicalVLA, updates: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(3)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    metrics: dict[str, torch.Tensor] = {}
    for _ in range(updates):
        loss, metrics = model.train().loss(composed_batch(model.config, 32, generator))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    return {name: value.item() for name, value in metrics.items()}


@pytest.fixture(scope="module")
def skilled() -> HierarchicalVLA:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = HierarchicalVLA(configure(skills=list(SKILLS), hold_steps=2, learned_termination=True, hidden_dim=32))
    train(model, 200)
    return model


def test_skills_are_learned_from_nothing_but_their_order(skilled: HierarchicalVLA):
    batch = composed_batch(skilled.config, 40, torch.Generator().manual_seed(9))
    with torch.no_grad():
        _, metrics = skilled.loss(batch)
    assert metrics["action_error"] < 0.1
    assert metrics["planner_accuracy"] > 0.95


def test_a_planner_that_is_told_a_wrong_skill_before_names_the_one_that_it_sees(skilled: HierarchicalVLA):
    batch = composed_batch(skilled.config, 40, torch.Generator().manual_seed(9))
    is_left = (batch.states[..., 0] > 0.5) ^ (batch.states[..., 1] > 0.5)
    wrong = is_left.long() if SKILLS[0] == "left" else 1 - is_left.long()
    with torch.no_grad():
        plan = skilled.planner(skilled.planner.perceive(batch.states, None, {}), wrong).argmax(-1)
    assert (plan != wrong).float().mean() > 0.95


def test_learned_subgoals_do_what_the_oracles_do_and_random_ones_do_not(skilled: HierarchicalVLA):
    def oracle(observation: Observation) -> str:
        is_left = bool(observation.proprio[1]) ^ bool(observation.proprio[0])
        return "left" if is_left else "right"

    rng = np.random.default_rng(0)
    scores = {}
    for source in ("oracle", "learned", "random"):
        policy = make_policy(skilled, subgoals=source, oracle=oracle if source == "oracle" else None)
        right = []
        for episode in range(20):
            state, first = policy.initial_state(), float(episode % 2)
            for step in range(8):
                observation = observe(float(step >= 4), first, rng.normal())
                (chunk,), (state,) = policy.act([observation], [state], generator=rng)
                wanted = -0.8 if oracle(observation) == "left" else 0.8
                right.append(abs(chunk[0, 0] - wanted) < 0.4)
        scores[source] = np.mean(right)
    assert scores["oracle"] > 0.97
    assert scores["learned"] > 0.9
    assert 0.3 < scores["random"] < 0.7


@pytest.mark.parametrize("skills", [[], list(SKILLS)], ids=["latent", "skills"])
def test_no_gradient_crosses_the_levels(skills: list[str]):
    model = HierarchicalVLA(configure(skills=skills))
    planner = list(model.planner.parameters())
    controller = [p for name, p in model.named_parameters() if not name.startswith("planner.")]
    high, low = (torch.randn(4, size, requires_grad=True) for size in (64, 64))
    model(high, low).sum().backward()
    assert all(p.grad is None for p in planner)
    assert high.grad is None
    assert any(p.grad is not None for p in controller)
    model.zero_grad()
    batch = replace(make_train_batch(model.config), tasks=("left", "right", "left", "right"))
    _, metrics = model.loss(batch)
    model.train()
    torch.manual_seed(0)
    high = model.planner.perceive(batch.states, None, {})
    planned = torch.autograd.grad(model.planner(high, None).sum(), controller, allow_unused=True)
    assert all(gradient is None for gradient in planned)
    assert metrics["planner_loss"] > 0


def test_a_subgoal_is_held_for_k_steps_and_rows_keep_their_own():
    model = HierarchicalVLA(configure(hold_steps=3))
    policy = make_policy(model)
    rng = np.random.default_rng(0)
    first = policy.initial_state()
    _, (late,) = policy.act([observe(1, 2, 3)], [policy.initial_state()])
    states, targets = [first, late], []
    for _ in range(6):
        _, states = policy.act([observe(*rng.normal(size=3)) for _ in range(2)], states)
        targets.append([state.target for state in states])
    held = np.array([[not np.array_equal(now[row], then[row]) for row in range(2)] for now, then in zip(
        targets[1:], targets, strict=False)])  # fmt: skip
    assert np.flatnonzero(held[:, 0]).tolist() == [2]
    assert np.flatnonzero(held[:, 1]).tolist() == [1, 4]
    with pytest.raises(ValueError, match="read-only"):
        states[0].target[:] = 0


def count_rows(module: torch.nn.Module) -> list[int]:
    """Rows of each call of a level's perception from here on."""
    seen: list[int] = []
    module.encoder.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    return seen


@pytest.mark.parametrize("skills", [[], list(SKILLS)], ids=["latent", "skills"])
def test_a_batch_asks_the_planner_only_for_rows_whose_subgoal_is_due(skills: list[str]):
    """Sessions that began at different times: two rates in one batch."""
    hold = 4
    model = HierarchicalVLA(configure(hold_steps=hold, context_steps=8, skills=skills))
    policy, rng = make_policy(model), np.random.default_rng(0)
    states, ages = [], []
    for age in (0, 1, 2, 3, 4, 5):
        state = policy.initial_state()
        for _ in range(age):
            _, (state,) = policy.act([observe(*rng.normal(size=3))], [state])
        states.append(state)
        ages.append(age)
    planner, controller = count_rows(model.planner), count_rows(model.controller)
    for step in range(8):
        due = [row for row, age in enumerate(ages) if (age + step) % hold == 0]
        before = states
        observations = [observe(*rng.normal(size=3)) for _ in states]
        chunks, states = policy.act(observations, before)
        assert (planner, controller) == ([len(due)] if due else [], [len(states)])
        planner.clear(), controller.clear()
        alone = [policy.act([o], [s])[0][0] for o, s in zip(observations, before, strict=True)]
        np.testing.assert_allclose(chunks, alone, atol=1e-5)
        planner.clear(), controller.clear()


def test_a_skill_that_ends_early_asks_the_planner_for_its_own_row_alone():
    model = HierarchicalVLA(configure(skills=list(SKILLS), hold_steps=1000, learned_termination=True))
    assert model.terminate is not None
    for parameter in model.terminate.parameters():
        torch.nn.init.zeros_(parameter)
    policy, states = make_policy(model), []
    for skill in (0, 1, 0):
        states.append(replace(policy.initial_state(timestep=1), skill=skill, age=0))
    with torch.no_grad():  # a skill's own vector says whether it is over
        over = model.embed_skill(torch.tensor(1))
        model.terminate.widen.weight[0, model.config.low_level_dim :] = over
        model.terminate.widen.bias[0] = -float(over.square().sum()) / 2
        model.terminate.head.weight[0, 0] = 10.0
        model.terminate.head.bias.fill_(-5.0)
    over = [bool(logit > 0) for logit in policy_stops(model, (0, 1, 0))]
    assert over == [False, True, False]
    planner = count_rows(model.planner)
    _, after = policy.act([observe(0, 0, 0)] * 3, states)
    assert planner == [1]
    assert [state.skill for state in after] == [0, 0, 0]


def policy_stops(model: HierarchicalVLA, skills: tuple[int, ...]) -> torch.Tensor:
    low = torch.zeros(len(skills), model.config.low_level_dim)
    stops = model.stop_logits(low, model.embed_subgoal(torch.tensor(skills)))
    assert stops is not None
    return stops


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"skills": list(SKILLS)},
        {"skills": list(SKILLS), "controller": {"architecture": "decision_transformer", "n_layers": 1, "n_heads": 1}},
        {"skills": list(SKILLS), "controller": {"architecture": "memory", "memory_dim": 16, "num_heads": 1}},
    ],
    ids=["latent", "skills", "decision_transformer", "memory"],
)
def test_a_batch_in_parts_weighs_as_much_as_in_one_whatever_the_controller(changes: dict):
    torch.manual_seed(0)
    model = HierarchicalVLA(configure(**changes)).eval()
    batch = make_train_batch(model.config, num_windows=6)
    batch = replace(batch, tasks=("left", "right", "left+right", "right", "left", "right"))
    parts = [batch.rows(0, 2), batch.rows(2, 6)]
    counts = [model.loss_count(part) for part in parts]
    whole, _ = model.loss(batch)
    mean = sum(count * model.loss(part)[0] for count, part in zip(counts, parts, strict=True)) / sum(counts)
    torch.testing.assert_close(mean, whole, rtol=1e-4, atol=1e-5)


def test_a_skill_that_says_it_is_done_makes_way_for_another():
    model = HierarchicalVLA(configure(skills=list(SKILLS), hold_steps=1000, learned_termination=True))
    assert model.terminate is not None
    torch.nn.init.zeros_(model.terminate.head.weight)
    torch.nn.init.constant_(model.terminate.head.bias, 5.0)
    policy, seen = make_policy(model), []
    state = policy.initial_state(timestep=1)
    for _ in range(4):
        _, (state,) = policy.act([observe(0, 0, 0)], [state])
        seen.append(state.skill)
    assert seen in ([0, 1, 0, 1], [1, 0, 1, 0])


def test_a_skill_ends_once_it_has_hardly_a_chance_to_last():
    model = HierarchicalVLA(configure(skills=list(SKILLS), hold_steps=1000, learned_termination=True))
    assert model.terminate is not None
    torch.nn.init.zeros_(model.terminate.head.weight)
    torch.nn.init.constant_(model.terminate.head.bias, float(torch.logit(torch.tensor(0.5))))
    policy, seen = make_policy(model), []
    state = policy.initial_state(timestep=1)
    for _ in range(10):
        _, (state,) = policy.act([observe(0, 0, 0)], [state])
        seen.append(state.skill)
    # A half to the power of 3 is above a tenth, to the power of 4 below.
    assert [skill == seen[0] for skill in seen] == [True] * 4 + [False] * 4 + [True] * 2


def test_replayed_observations_rebuild_a_latent_plan():
    policy = make_policy(HierarchicalVLA(configure()))
    readings = np.random.default_rng(1).normal(size=(11, 3))

    def drive(first: int):
        state, chunk = policy.initial_state(timestep=first), None
        for reading in readings[first:]:
            (chunk,), (state,) = policy.act([observe(*reading)], [state])
        return chunk

    np.testing.assert_array_equal(drive(0), drive(len(readings) - policy.context_steps))


def test_the_latent_plan_is_the_state_at_the_end_of_the_hold():
    """States that move by a constant: the planner learns the displacement, the controller the action that brings it."""
    torch.manual_seed(0)
    model = HierarchicalVLA(configure(hold_steps=4, context_steps=8))
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        batch = make_train_batch(model.config, num_windows=32)
        speed = torch.randint(0, 2, (32, 1)).float() * 0.2 - 0.1
        states = torch.zeros(32, 8, 3)
        states[..., 0] = speed * torch.arange(8) + torch.randn(32, 1)
        states[..., 1] = speed * 10
        targets = torch.zeros(32, 8, 2)
        targets[..., 0] = speed * 8
        batch = replace(batch, states=states, target_actions=targets, padding_mask=torch.ones(32, 8, dtype=torch.bool))
        optimiser.zero_grad()
        model.loss(batch)[0].backward()
        optimiser.step()
    policy = make_policy(model)
    for sign in (1.0, -1.0):
        (chunk,), (state,) = policy.act([observe(0.3, sign, 0)], [policy.initial_state()])
        assert state.target[0] == pytest.approx(0.3 + sign * 0.4, abs=0.15)
        assert chunk[0, 0] == pytest.approx(sign * 0.8, abs=0.2)


@pytest.mark.parametrize("name", ["decision_transformer", "memory"])
def test_any_member_that_reads_goals_can_be_the_controller(name: str):
    sizes = {"decision_transformer": {"hidden_dim": 32, "n_layers": 1, "n_heads": 2}, "memory": {"memory_dim": 32}}
    config = configure(skills=list(SKILLS), controller={"architecture": name, **sizes[name]})
    model = HierarchicalVLA(config)
    assert type(model.controller) is architecture(name).model
    assert (model.controller.config.goal_dim, model.controller.config.state_dim) == (config.subgoal_dim, 3)
    batch = replace(make_train_batch(config), tasks=("left", "right", "left+right", "right"))
    loss, metrics = model.loss(batch)
    loss.backward()
    assert torch.isfinite(loss)
    assert {"planner_loss", "controller_loss"} <= set(metrics)
    assert model.embed_skill is not None
    assert model.embed_skill.weight.grad is not None
    chunk = {}
    for skill in SKILLS:
        policy = make_policy(model, subgoals="oracle", oracle=lambda observation, skill=skill: skill)
        (chunk[skill],), (state,) = policy.act([observe(1, 2, 3)], [policy.initial_state()])
        assert state.low_level is not None
    assert not np.array_equal(chunk["left"], chunk["right"]), "the controller reads the skill"


def test_the_chapters_call():
    model = HierarchicalVLA(256, 64, 7)
    action = model(torch.randn(2, 256), torch.randn(2, 64))
    assert action.shape == (2, 7)
    assert action.abs().max() <= 1
    linear = HierarchicalVLA(256, 64, 7, subgoal_dim=16, hidden_dim=0)
    assert linear.controller.head.in_features == 64 + 16
    assert linear(torch.randn(2, 256), torch.randn(2, 64)).shape == (2, 7)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"hold_steps": 8}, "must exceed hold_steps"),
        ({"learned_termination": True}, "need named skills"),
        ({"controller": {"architecture": "memory"}}, "need named skills"),
        ({"previous_skill_noise": 1.5}, "previous_skill_noise 1.5 must be within 0 and 1"),
        ({"skills": ["a", "a"]}, "distinct"),
        ({"horizon": 4}, "horizon 1"),
        ({"head": "flow"}, "built-in controller"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict, complaint: str):
    with pytest.raises(ConfigError, match=complaint):
        configure(**changes)


def test_what_does_not_fit_is_refused():
    model = HierarchicalVLA(configure(skills=list(SKILLS)))
    with pytest.raises(DataError, match="made of the skills"):
        model.loss(make_train_batch(model.config))
    with pytest.raises(DataError, match="must end in 64"):
        model(torch.randn(2, 5), torch.randn(2, 64))
    with pytest.raises(ConfigError, match="oracle"):
        make_policy(model, subgoals="oracle")
    with pytest.raises(NotFound, match="sideways"):
        make_policy(model, subgoals="oracle", oracle=lambda o: "sideways").act(
            [observe(0, 0, 0)], [make_policy(model).initial_state()]
        )
    with pytest.raises(ConfigError, match="controller memory has no setting 'wings'"):
        HierarchicalVLA(configure(skills=["a"], controller={"architecture": "memory", "wings": 2}))
    with pytest.raises(ConfigError, match="has no setting 'wings'"):
        HierarchicalVLA(8, 8, 2, wings=2)
