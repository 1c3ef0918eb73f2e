"""Levels that see their last steps: the same in training and in acting, and they use what only those hold."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.core.types import Observation
from vla_dist.models.conditioning import ReturnConditioning
from vla_dist.models.hierarchical.config import HierarchicalVLAConfig
from vla_dist.models.hierarchical.hierarchical_vla import HierarchicalVLA
from vla_dist.models.hierarchical.policy import HierarchicalPolicy
from vla_dist.models.zoo import architecture
from vla_dist.testing.fakes import make_spec
from vla_dist.testing.windows import make_train_batch

SPEC = make_spec(proprio_dim=3, action_dim=2)


def configure(**changes) -> HierarchicalVLAConfig:
    settings = {"goal_dim": 0, "skills": ["go"], "controller_context_steps": 5, "context_steps": 8}
    return architecture("hierarchical").configure("tiny", SPEC, **{**settings, **changes})


def make_policy(model: HierarchicalVLA) -> HierarchicalPolicy:
    return HierarchicalPolicy(model, SPEC, conditioning=ReturnConditioning(), goals=None)


def drive(policy: HierarchicalPolicy, readings: np.ndarray) -> np.ndarray:
    """(T, P) to the (T, A) actions of one episode."""
    state, actions = policy.initial_state(), []
    for reading in readings:
        (chunk,), (state,) = policy.act([Observation(proprio=reading.astype(np.float32))], [state])
        actions.append(chunk[0])
    return np.stack(actions)


def in_training(model: HierarchicalVLA, readings: np.ndarray, *, pads: int = 0) -> np.ndarray:
    """The same actions from one window, after so many padded steps."""
    states = torch.cat([torch.full((1, pads, 3), 7.0), torch.tensor(readings, dtype=torch.float32)[None]], 1)
    is_step = torch.arange(states.shape[1])[None] >= pads
    with torch.no_grad():
        low = model.controller.recall_window(model.controller.perceive(states, {}), is_step)
        subgoal = model.embed_subgoal(torch.zeros(low.shape[:2], dtype=torch.int64))
        return model.controller(low, subgoal)[0, pads:].numpy()


def test_acting_sees_what_training_saw_with_and_without_padding():
    torch.manual_seed(0)
    model = HierarchicalVLA(configure()).eval()
    readings = np.random.default_rng(0).normal(size=(8, 3))
    acted = drive(make_policy(model), readings)
    np.testing.assert_allclose(acted, in_training(model, readings), atol=1e-5)
    np.testing.assert_allclose(acted, in_training(model, readings, pads=3), atol=1e-5)
    moved = readings.copy()
    moved[0] += 1.0
    changed = np.abs(drive(make_policy(model), moved) - acted).max(1) > 1e-6
    assert changed.tolist() == [True] * 5 + [False] * 3, "it sees five steps and no more"


def test_a_window_in_half_precision_comes_to_nearly_the_same():
    torch.manual_seed(0)
    model = HierarchicalVLA(configure(planner_context_steps=5)).eval()
    states, is_step = torch.randn(4, 8, 3), torch.arange(8) >= torch.tensor([0, 1, 3, 7])[:, None]
    with torch.no_grad():
        exact = model.controller.recall_window(model.controller.perceive(states, {}), is_step)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model.controller.recall_window(model.controller.perceive(states, {}), is_step)
    torch.testing.assert_close(rough.float(), exact, atol=0.1, rtol=0.1)


def test_rows_of_a_batch_keep_their_own_past():
    torch.manual_seed(0)
    model = HierarchicalVLA(configure()).eval()
    readings = np.random.default_rng(1).normal(size=(2, 6, 3)).astype(np.float32)
    alone = [drive(make_policy(model), rows) for rows in (readings[0], readings[1][:3])]
    policy = make_policy(model)
    first, second = policy.initial_state(), policy.initial_state()
    for step in range(6):  # the second begins when the first has seen three steps
        if step < 3:
            _, (first,) = policy.act([Observation(proprio=readings[0, step])], [first])
            continue
        rows = [Observation(proprio=readings[0, step]), Observation(proprio=readings[1, step - 3])]
        chunks, (first, second) = policy.act(rows, [first, second])
    np.testing.assert_allclose(chunks[0][0], alone[0][-1], atol=1e-6)
    np.testing.assert_allclose(chunks[1][0], alone[1][-1], atol=1e-6)
    assert first.recent_low.shape == (4, model.config.low_level_dim)
    assert not first.recent_low.flags.writeable


@pytest.mark.parametrize(("steps", "is_learned"), [(1, False), (4, True)])
def test_what_only_the_past_tells_is_learned_with_a_past_alone(steps: int, is_learned: bool):
    torch.manual_seed(0)
    model = HierarchicalVLA(configure(controller_context_steps=steps, context_steps=4))
    generator = torch.Generator().manual_seed(1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        batch = make_train_batch(model.config, num_windows=32)
        states = torch.randn(batch.states.shape, generator=generator)
        targets = torch.zeros_like(batch.target_actions)
        targets[:, 3, 0] = states[:, 0, 0].sign() * 0.8
        mask = torch.ones_like(batch.padding_mask)
        batch = replace(batch, states=states, target_actions=targets, padding_mask=mask, tasks=("go",) * 32)
        loss, _ = model.train().loss(batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    readings = np.random.default_rng(2).normal(size=(64, 4, 3))
    acted = np.array([drive(make_policy(model), rows)[3, 0] for rows in readings])
    agreement = np.mean(np.sign(acted) == np.sign(readings[:, 0, 0]))
    assert (agreement > 0.85) == is_learned, agreement


def configure_planner(steps: int) -> HierarchicalVLAConfig:
    """Without skills: what it plans at each step is the state of the next one."""
    return configure(skills=[], hold_steps=1, controller_context_steps=1, planner_context_steps=steps)


def plans_of(model: HierarchicalVLA, readings: np.ndarray) -> np.ndarray:
    """(T, P) to the (T, P) that the planner wants reached, in normalised units."""
    policy, plans = make_policy(model), []
    state = policy.initial_state()
    for reading in readings:
        _, (state,) = policy.act([Observation(proprio=reading.astype(np.float32))], [state])
        plans.append(state.target)
    return np.stack(plans)


def test_a_planner_plans_by_what_it_saw_in_training():
    torch.manual_seed(0)
    model = HierarchicalVLA(configure_planner(5)).eval()
    readings = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    planned = plans_of(model, readings)
    states = torch.cat([torch.full((1, 2, 3), 7.0), torch.from_numpy(readings)[None]], 1)
    is_step = torch.arange(10)[None] >= 2
    with torch.no_grad():
        high = model.planner.recall_window(model.planner.perceive(states, None, {}), is_step)
        wanted = (states + model.planner(high, None))[0, 2:].numpy()
    np.testing.assert_allclose(planned, wanted, atol=1e-5)
    moved = readings.copy()
    moved[0] += 1.0
    changed = np.abs(plans_of(model, moved) - planned).max(1) > 1e-6
    assert changed.tolist() == [True] * 5 + [False] * 3, "it sees five steps and no more"


def test_a_planner_sees_also_the_steps_at_which_it_is_not_asked():
    torch.manual_seed(0)
    model = HierarchicalVLA(configure(planner_context_steps=5, skills=["go", "come"], hold_steps=4)).eval()
    policy, reading = make_policy(model), np.ones(3, np.float32)
    state, kept = policy.initial_state(), []
    for _ in range(6):
        _, (state,) = policy.act([Observation(proprio=reading)], [state])
        kept.append(len(state.recent_high))
    assert kept == [1, 2, 3, 4, 4, 4]
    assert not state.recent_high.flags.writeable


@pytest.mark.parametrize(("steps", "is_learned"), [(1, False), (5, True)])
def test_a_planner_learns_what_only_the_past_tells_with_a_past_alone(steps: int, is_learned: bool):
    def walks(number: int, length: int) -> torch.Tensor:
        states = torch.randn(number, length, 3, generator=generator)
        states[:, 5:, 1] = states[:, 1:-4, 0].sign()  # what is seen comes true four steps later
        return states

    torch.manual_seed(0)
    model = HierarchicalVLA(configure_planner(steps))
    generator = torch.Generator().manual_seed(1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        batch = make_train_batch(model.config, num_windows=32)
        mask = torch.ones_like(batch.padding_mask)
        loss, _ = model.train().loss(replace(batch, states=walks(32, 8), padding_mask=mask))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    readings = walks(64, 9).numpy()
    planned = np.array([plans_of(model.eval(), rows[:8])[7, 1] for rows in readings])
    agreement = np.mean(np.sign(planned) == readings[:, 8, 1])
    assert (agreement > 0.85) == is_learned, agreement


def test_contexts_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="controller_context_steps 9 must be within 1 and context_steps 8"):
        configure(controller_context_steps=9)
    with pytest.raises(ConfigError, match="planner_context_steps 0 must be within 1 and context_steps 8"):
        configure(planner_context_steps=0)
    with pytest.raises(ConfigError, match="of the built-in controller"):
        configure(controller={"architecture": "memory"})
    model = HierarchicalVLA(configure())
    with pytest.raises(DataError, match="3 steps were given to a level that sees 5"):
        model.controller.recall(torch.zeros(1, 3, 64), torch.ones(1, 3, dtype=torch.bool))
