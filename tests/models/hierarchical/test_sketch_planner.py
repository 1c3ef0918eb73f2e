"""A planner that reads the order of skills: orders that it was never shown, words that change, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.core.state_tree import rebuild_state, state_leaves
from vla_dist.core.types import Observation
from vla_dist.models.auto import build_policy, make_artifact
from vla_dist.models.batch import TrainBatch
from vla_dist.models.clauses import by_clause
from vla_dist.models.conditioning import ReturnConditioning
from vla_dist.models.goals import GoalTable
from vla_dist.models.hierarchical.config import HierarchicalVLAConfig
from vla_dist.models.hierarchical.hierarchical_vla import HierarchicalVLA
from vla_dist.models.hierarchical.policy import HierarchicalPolicy
from vla_dist.models.zoo import architecture
from vla_dist.testing.fakes import make_spec
from vla_dist.testing.windows import make_train_batch

SPEC = make_spec(proprio_dim=3, action_dim=3)
SKILLS = ("left", "right", "up")
"""Each drives one dimension of the action, and proprio tells of each whether it has been done."""
SHOWN = ("left", "right", "up", "left, then right", "right, then left", "left, then up", "up, then right")
NEVER_SHOWN = ("right, then up", "up, then left")
VECTORS = dict(zip(SKILLS, torch.randn(3, 16, generator=torch.Generator().manual_seed(1)).numpy(), strict=True))


def embed(texts):
    return np.stack([VECTORS[text] for text in texts])


EMBED = by_clause(embed, 2)


def configure(**changes) -> HierarchicalVLAConfig:
    settings = {"skills": list(SKILLS), "learned_termination": True, "goal_dim": 32, "goal_clauses": 2}
    return architecture("hierarchical").configure("tiny", SPEC, **{**settings, "planner": "sketch", **changes})


def make_policy(model: HierarchicalVLA, **changes) -> HierarchicalPolicy:
    return HierarchicalPolicy(model, SPEC, conditioning=ReturnConditioning(), goals=GoalTable(EMBED), **changes)


def observe(done: np.ndarray, words: str) -> Observation:
    return Observation(proprio=done.astype(np.float32), instruction=words)


def shown_batch(config: HierarchicalVLAConfig, count: int, generator: torch.Generator) -> TrainBatch:
    steps = config.context_steps
    words = tuple(SHOWN[row % len(SHOWN)] for row in range(count))
    orders = [[SKILLS.index(skill) for skill in text.split(", then ")] for text in words]
    change = torch.randint(2, steps - 1, (count,), generator=generator)
    states, targets = torch.zeros(count, steps, 3), torch.zeros(count, steps, 3)
    for row, order in enumerate(orders):
        until = int(change[row])  # a skill alone goes on when it is done: else what follows it might be a part of it
        targets[row, :until, order[0]] = targets[row, until:, order[-1]] = 0.8
        states[row, until:, order[0]] = 1.0
    return replace(
        make_train_batch(config, num_windows=count),
        states=states,
        goals=torch.from_numpy(EMBED(words)),
        target_actions=targets,
        padding_mask=torch.ones(count, steps, dtype=torch.bool),
        timesteps=torch.arange(steps).repeat(count, 1),
        tasks=("mixed",) * count,
        instructions=words,
    )


@pytest.fixture(scope="module")
def skilled() -> HierarchicalVLA:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = HierarchicalVLA(configure(hidden_dim=32))
    generator = torch.Generator().manual_seed(3)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(250):
        loss, metrics = model.train().loss(shown_batch(model.config, 28, generator))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert metrics["planner_accuracy"] == 1.0
    return model.eval()


def carried_out(policy: HierarchicalPolicy, words: str, *, steps: int = 40) -> list[str]:
    """What a robot does in a world where each skill takes three steps."""
    state, done, spent, did = policy.initial_state(), np.zeros(3), np.zeros(3), []
    for _ in range(steps):
        (chunk,), (state,) = policy.act([observe(done, words)], [state])
        skill = int(chunk[0].argmax())
        spent[skill] += 1
        done[skill] = spent[skill] >= 3
        if not did or did[-1] != SKILLS[skill]:
            did.append(SKILLS[skill])
    return did


@pytest.mark.parametrize("words", [*SHOWN, *NEVER_SHOWN])
def test_known_clauses_are_carried_out_in_orders_that_were_never_shown(skilled: HierarchicalVLA, words: str):
    assert carried_out(make_policy(skilled), words) == words.split(", then ")


def test_rows_follow_their_own_words_and_new_words_begin_anew(skilled: HierarchicalVLA):
    policy = make_policy(skilled)
    start, fresh = policy.initial_state(), np.zeros(3)
    both = [observe(fresh, "left, then up"), observe(fresh, "up, then right")]
    _, states = policy.act(both, [start, start])
    assert [SKILLS[state.skill] for state in states] == ["left", "up"]
    both = [observe(np.array([1, 0, 0]), "left, then up"), observe(fresh, "up, then right")]
    for _ in range(20):
        _, states = policy.act(both, states)
    assert [(SKILLS[state.skill], state.clause) for state in states] == [("up", 1), ("up", 0)]
    both = [replace(both[0], instruction="right, then left"), both[1]]
    _, states = policy.act(both, states)
    assert [(SKILLS[state.skill], state.clause) for state in states] == [("right", 0), ("up", 0)]


def test_a_state_that_has_travelled_goes_on_where_it_was(skilled: HierarchicalVLA):
    policy = make_policy(skilled)
    done, words = np.array([1.0, 0.0, 0.0]), "left, then up"
    state = policy.initial_state()
    for _ in range(20):
        _, (state,) = policy.act([observe(done, words)], [state])
    arrived = rebuild_state(policy.initial_state(), dict(state_leaves(state)))
    assert (arrived.clause, arrived.words) == (state.clause, state.words)
    _, (here, there) = policy.act([observe(done, words)] * 2, [state, arrived])
    assert here.skill == there.skill == SKILLS.index("up")


def test_the_last_skill_goes_on_when_it_says_that_it_is_done(skilled: HierarchicalVLA):
    policy = make_policy(skilled)
    state, everything = policy.initial_state(), np.ones(3)
    for _ in range(60):
        _, (state,) = policy.act([observe(everything, "left, then up")], [state])
    assert (SKILLS[state.skill], state.clause) == ("up", 1)


def test_an_oracle_stands_in_for_the_sketch(skilled: HierarchicalVLA):
    policy = make_policy(skilled, subgoals="oracle", oracle=lambda observation: "right")
    assert carried_out(policy, "left, then up") == ["right"]


def test_a_published_policy_reads_sentences_that_it_was_not_published_with(skilled: HierarchicalVLA):
    goals = GoalTable(EMBED)
    goals.remember(SHOWN)
    artifact = make_artifact(skilled, name="reader", spec=SPEC, conditioning=ReturnConditioning(), goals=goals)
    policy = build_policy(artifact, embed=embed)
    assert isinstance(policy, HierarchicalPolicy)
    for words in (SHOWN[-1], *NEVER_SHOWN):
        assert carried_out(policy, words) == words.split(", then ")


def test_windows_whose_words_do_not_match_their_sketch_teach_no_reading():
    torch.manual_seed(0)
    model = HierarchicalVLA(configure()).eval()
    batch = shown_batch(model.config, 7, torch.Generator().manual_seed(0))
    told = replace(batch, tasks=("left+right",) * 7, goals=torch.from_numpy(EMBED(["left"] * 7)))
    loss, metrics = model.loss(told)
    assert metrics["planner_loss"] == 0.0
    assert torch.isfinite(loss)


def test_a_sketch_that_is_longer_than_what_is_read_is_refused():
    model = HierarchicalVLA(configure())
    batch = shown_batch(model.config, 7, torch.Generator().manual_seed(0))
    with pytest.raises(DataError, match=r"3 skills .* 2 clauses"):
        model.loss(replace(batch, tasks=("left+right+up",) * 7))


def test_a_batch_in_parts_weighs_as_much_as_in_one():
    torch.manual_seed(0)
    model = HierarchicalVLA(configure()).eval()
    batch = shown_batch(model.config, 6, torch.Generator().manual_seed(0))
    parts = [batch.rows(0, 2), batch.rows(2, 6)]
    counts = [model.loss_count(part) for part in parts]
    mean = sum(count * model.loss(part)[0] for count, part in zip(counts, parts, strict=True)) / sum(counts)
    torch.testing.assert_close(mean, model.loss(batch)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"planner": "dreamy"}, "reactive, sketch"),
        ({"learned_termination": False}, "learned_termination"),
        ({"skills": []}, "skills"),
        ({"goal_dim": 0, "goal_clauses": 1}, "goal_dim"),
        ({"goal_clauses": 3}, "goal_clauses"),
        ({"planner_context_steps": 4}, "planner_context_steps"),
        ({"controller": {"architecture": "decision_transformer"}}, "built-in"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict, complaint: str):
    with pytest.raises(ConfigError, match=complaint):
        configure(**changes)


def test_one_call_needs_a_planner_that_looks():
    with pytest.raises(ConfigError, match="policy"):
        HierarchicalVLA(configure())(torch.zeros(1, 64), torch.zeros(1, 64))
