"""MemoryAugmentedVLA: a memory that is each row's own, that can be taken away, and that is learned in seconds."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.core.types import Observation
from vla_dist.models.batch import TrainBatch
from vla_dist.models.conditioning import ReturnConditioning
from vla_dist.models.memory.memory_vla import MemoryAugmentedVLA, MemoryAugmentedVLAConfig
from vla_dist.models.memory.policy import MemoryPolicy
from vla_dist.models.memory.presets import PRESETS
from vla_dist.testing.fakes import make_spec

STEPS, CUES = 8, 4


def make_batch(states: torch.Tensor, targets: torch.Tensor, **changes) -> TrainBatch:
    batch, steps = states.shape[:2]
    fields = {
        "states": states,
        "actions": torch.zeros_like(targets),
        "target_actions": targets,
        "returns_to_go": torch.zeros(batch, steps),
        "timesteps": torch.arange(steps).repeat(batch, 1),
        "padding_mask": torch.ones(batch, steps, dtype=torch.bool),
        "target_chunks": targets[:, -1:],
        "chunk_mask": torch.ones(batch, 1, dtype=torch.bool),
        "instructions": ("go",) * batch,
        "tasks": ("go",) * batch,
        "success": torch.ones(batch, dtype=torch.bool),
        "interventions": torch.zeros(batch, steps, dtype=torch.bool),
    }
    return TrainBatch(**{**fields, **changes})


def recall_batch(count: int, generator: torch.Generator, *, steps: int = STEPS, least: int | None = None) -> TrainBatch:
    """A cue at the first step, noise, and at the last step the question which cue it was: 0 = wait, 1.. = the cue.

    With ``least`` the episodes have ``least`` to ``steps`` steps, padded on the left.
    """
    cue = torch.randint(CUES, (count,), generator=generator)
    lengths = torch.full((count,), steps)
    if least is not None:
        lengths = torch.randint(least, steps + 1, (count,), generator=generator)
    first = steps - lengths
    states = torch.zeros(count, steps, CUES + 2)
    states[..., CUES] = torch.randn(count, steps, generator=generator)
    states[torch.arange(count), first] = torch.nn.functional.one_hot(cue, CUES + 2).float()
    states[:, -1, CUES + 1] = 1.0
    answers = torch.zeros(count, steps, dtype=torch.long)
    answers[:, -1] = cue + 1
    step = torch.arange(steps)
    return make_batch(
        states,
        torch.nn.functional.one_hot(answers, CUES + 1).float(),
        padding_mask=step >= first[:, None],
        timesteps=(step - first[:, None]).clamp_min(0),
    )


def small_model(**changes) -> MemoryAugmentedVLA:
    settings = {"head": "discrete", "goal_dim": 0, "num_heads": 2, "context_steps": STEPS, "burn_in_steps": 0}
    settings["write_cost"] = 0.002  # every filler step is another number, so it must not be written
    return MemoryAugmentedVLA(CUES + 2, 12, 32, action_dim=CUES + 1, **{**settings, **changes})


@pytest.fixture(scope="module")
def trained() -> MemoryAugmentedVLA:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, generator = small_model(), torch.Generator().manual_seed(1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        loss, _ = model.loss(recall_batch(32, generator, least=2))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def answers_right(outputs: torch.Tensor, batch: TrainBatch) -> float:
    return (outputs[:, -1].argmax(-1) == batch.target_actions[:, -1].argmax(-1)).float().mean().item()


@torch.no_grad()
def test_it_recalls_the_cue_and_without_memory_it_can_only_guess(trained: MemoryAugmentedVLA):
    batch = recall_batch(400, torch.Generator().manual_seed(2))
    whole = trained.unroll(batch.states, None, batch.padding_mask)
    assert answers_right(whole.outputs, batch) > 0.98
    forgotten = torch.stack([trained(batch.states[:, step], None)[0] for step in range(STEPS)], 1)
    assert answers_right(forgotten, batch) < 1 / CUES + 0.1
    torch.testing.assert_close(whole.weights.sum(-1), torch.ones_like(whole.weights[..., 0]))
    assert whole.weights[:, -1, :, 1].amax(1).mean() > 0.9, "the answer comes from the slot of the cue"


@torch.no_grad()
def test_it_recalls_far_beyond_the_windows_of_training(trained: MemoryAugmentedVLA):
    batch = recall_batch(200, torch.Generator().manual_seed(3), steps=300)
    long = trained.unroll(batch.states, None, batch.padding_mask)
    assert long.memory.valid.all(), "the bank overflowed long ago"
    assert answers_right(long.outputs, batch) > 0.98


@torch.no_grad()
def test_rows_do_not_read_each_others_memory(trained: MemoryAugmentedVLA):
    batch = recall_batch(2, torch.Generator().manual_seed(4))
    outputs = trained.unroll(batch.states, None, batch.padding_mask).outputs
    changed = batch.states.clone()
    changed[0] = -changed[0]
    disturbed = trained.unroll(changed, None, batch.padding_mask).outputs
    assert outputs[1].equal(disturbed[1])
    assert not outputs[0].equal(disturbed[0])


@torch.no_grad()
def test_reset_of_a_row_forgets_its_cue_alone(trained: MemoryAugmentedVLA):
    batch = recall_batch(300, torch.Generator().manual_seed(5))
    memory = trained.unroll(batch.states[:, :-1], None, batch.padding_mask[:, :-1]).memory
    forget = torch.arange(300) % 2 == 0
    output, _, _ = trained(batch.states[:, -1], None, memory.reset(forget))
    right = output.argmax(-1) == batch.target_actions[:, -1].argmax(-1)
    assert right[~forget].float().mean() > 0.98
    assert right[forget].float().mean() < 1 / CUES + 0.13


@torch.no_grad()
def test_stored_state_joins_windows_into_one_episode(trained: MemoryAugmentedVLA):
    batch = recall_batch(4, torch.Generator().manual_seed(6), steps=STEPS + 3)
    whole = trained.unroll(batch.states, None, batch.padding_mask)
    memory = trained.unroll(batch.states[:, :3], None, batch.padding_mask[:, :3]).memory
    rest = trained.unroll(batch.states[:, 3:], None, batch.padding_mask[:, 3:], memory)
    torch.testing.assert_close(rest.outputs, whole.outputs[:, 3:])
    torch.testing.assert_close(rest.memory.contents, whole.memory.contents)
    late = make_batch(batch.states[:, 3:], batch.target_actions[:, 3:], timesteps=batch.timesteps[:, 3:])
    assert trained.loss(late, memory.detach())[0] < 0.1 < trained.loss(late)[0]


def test_burn_in_is_not_imitated_where_the_window_begins_within_an_episode():
    model = small_model(burn_in_steps=3).eval()
    batch = recall_batch(4, torch.Generator().manual_seed(7))
    late = replace(batch, timesteps=batch.timesteps + 5)
    assert model.loss_count(batch) == 4 * STEPS
    assert model.loss_count(late) == 4 * (STEPS - 3)
    padded = replace(late, padding_mask=batch.padding_mask & (torch.arange(STEPS) > 0))
    assert model.loss_count(padded) == 4 * (STEPS - 1), "padding says that the window holds the episode's beginning"
    wrong = late.target_actions.clone()
    wrong[:, :3] = wrong[:, :3].roll(1, -1)
    assert model.loss(late)[0].equal(model.loss(replace(late, target_actions=wrong))[0])
    assert not model.loss(batch)[0].equal(model.loss(replace(batch, target_actions=wrong))[0])


def test_padding_before_an_episode_changes_nothing_after_it():
    model = small_model().eval()
    batch = recall_batch(3, torch.Generator().manual_seed(8))
    junk = torch.full_like(batch.states[:, :2], 5.0)
    mask = torch.cat([torch.zeros(3, 2, dtype=torch.bool), batch.padding_mask], 1)
    plain = model.unroll(batch.states, None, batch.padding_mask)
    padded = model.unroll(torch.cat([junk, batch.states], 1), None, mask)
    torch.testing.assert_close(padded.outputs[:, 2:], plain.outputs)
    torch.testing.assert_close(padded.memory.contents, plain.memory.contents)


def test_window_weights_scale_the_loss():
    model = small_model().eval()
    batch = recall_batch(2, torch.Generator().manual_seed(9))
    first, second = (model.loss(batch.rows(row, row + 1))[0] for row in range(2))
    weighted, _ = model.loss(replace(batch, weights=torch.tensor([1.0, 0.0])))
    torch.testing.assert_close(weighted, first / 2)
    torch.testing.assert_close(model.loss(batch)[0], (first + second) / 2)


def test_every_parameter_learns_language_and_cameras_included():
    model = MemoryAugmentedVLA(
        5, 6, 16, action_dim=2, goal_dim=3, cameras=["eye"], num_heads=2, context_steps=4, burn_in_steps=0,
        visual={"backbone": "conv_small", "width": 8, "output_dim": 8},
    )  # fmt: skip
    torch.nn.init.normal_(model.head.weight)
    images = {"eye": torch.randint(256, (2, 4, 3, 16, 16), dtype=torch.uint8)}
    batch = make_batch(torch.randn(2, 4, 5), torch.rand(2, 4, 2), goals=torch.randn(2, 3), images=images)
    model.loss(batch)[0].backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not still


def test_the_chapters_call():
    model = MemoryAugmentedVLA(512, goal_dim=512, memory_size=10, memory_dim=64)
    action, weights, memory = model(torch.randn(2, 512), torch.randn(2, 512))
    assert action.shape == (2, 4)
    assert action.abs().max() <= 1
    assert weights.shape == (2, 4, 11)
    assert memory.valid.sum(1).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_heads": 5}, "do not divide"),
        ({"head": "guess"}, "one of tanh"),
        ({"burn_in_steps": 8}, "within 0..7"),
        ({"memory_size": 0}, "at least 1"),
        ({"horizon": 4}, "must be 1"),
        ({"state_dim": 0}, "there must be a state"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict, complaint: str):
    with pytest.raises(ConfigError, match=complaint):
        MemoryAugmentedVLAConfig(**{"memory_dim": 32, "num_heads": 2, "context_steps": 8, **changes})


def test_inputs_that_do_not_fit_are_refused():
    model = small_model()
    for inputs, goals in ((torch.zeros(2, 3), None), (torch.zeros(2, CUES + 2), torch.zeros(2, 3))):
        with pytest.raises(DataError, match="do not fit"):
            model(inputs, goals)
    with pytest.raises(DataError, match="must be"):
        model(torch.zeros(1, 2, CUES + 2), None)
    with pytest.raises(ConfigError, match="has no setting"):
        MemoryAugmentedVLA(3, slots=4)


def test_the_policy_carries_its_memory_as_arrays(trained: MemoryAugmentedVLA):
    spec = replace(make_spec(proprio_dim=CUES + 2, action_dim=CUES + 1), action_kind="discrete")
    policy = MemoryPolicy(trained, spec, conditioning=ReturnConditioning(), goals=None)
    batch = recall_batch(3, torch.Generator().manual_seed(10))
    states = [policy.initial_state() for _ in range(3)]
    first = states[0].contents.copy()
    chunks = []
    for step in range(STEPS):
        observations = [Observation(proprio=row.numpy()) for row in batch.states[:, step]]
        chunks, states = policy.act(observations, states)
    assert [int(chunk[0].argmax()) for chunk in chunks] == batch.target_actions[:, -1].argmax(-1).tolist()
    assert np.array_equal(policy.initial_state().contents, first)
    with pytest.raises(ValueError, match="read-only"):
        states[0].contents[:] = 0


@pytest.mark.parametrize("size", PRESETS)
def test_presets_fit_the_spec(size: str):
    config = PRESETS[size](make_spec(proprio_dim=3, action_dim=2), goal_dim=0)
    assert (config.state_dim, config.action_dim, config.head) == (3, 2, "tanh")
