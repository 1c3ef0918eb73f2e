"""Chunk executors: which action of which chunk, by arithmetic that a reader can redo."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.core.protocols import Policy
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Array, Observation
from vla_dist.models.chunking import ChunkExecution, OpenLoop, RealTimeChunks, TemporalEnsemble, overlap_weights
from vla_dist.testing.fakes import FakePolicy, make_spec

SPEC = make_spec(proprio_dim=1, action_dim=2)


@dataclass(frozen=True)
class Seen:
    readings: tuple[float, ...] = ()
    told: Array | None = None


class Labelled:
    """Row i of the chunk from reading r is (r, i): an action tells where it came from. Remembers K readings."""

    def __init__(self, horizon: int, *, context_steps: int = 1, spec: EnvSpec = SPEC) -> None:
        self.spec, self.horizon, self.context_steps = spec, horizon, context_steps
        self.num_asked = 0

    def initial_state(self, *, timestep: int = 0) -> Seen:
        return Seen()

    def act(
        self,
        observations: Sequence[Observation],
        states: Sequence[Seen],
        *,
        generator: np.random.Generator | None = None,
    ) -> tuple[list[Array], list[Seen]]:
        chunks, after = [], []
        for observation, state in zip(observations, states, strict=True):
            self.num_asked += 1
            readings = (*state.readings, float(observation.proprio[0]))[-self.context_steps :]
            rows = np.arange(self.horizon, dtype=np.float32)
            chunks.append(np.stack([np.full(self.horizon, sum(readings), np.float32), rows], 1))
            after.append(Seen(readings, observation.previous_action))
        return chunks, after


def observe(reading: float) -> Observation:
    return Observation(proprio=np.array([reading], np.float32))


def drive(policy: Policy, readings: Sequence[float], *, first: int = 0) -> tuple[Array, object]:
    state, actions = policy.initial_state(timestep=first), []
    for reading in readings:
        (chunk,), (state,) = policy.act([observe(reading)], [state])
        assert chunk.shape == (1, policy.spec.action_dim)
        actions.append(chunk[0])
    return np.stack(actions), state


def test_open_loop_executes_rows_in_order_and_asks_when_they_are_used_up():
    inner = Labelled(4)
    actions, _ = drive(OpenLoop(inner, execute_steps=3), range(7))
    assert actions.tolist() == [[0, 0], [0, 1], [0, 2], [3, 0], [3, 1], [3, 2], [6, 0]]
    assert inner.num_asked == 3


def test_ensemble_weighs_the_oldest_chunk_heaviest_as_act_does():
    actions, _ = drive(TemporalEnsemble(Labelled(3), decay=0.5), range(5))
    weights = np.exp(-0.5 * np.arange(3))
    # At step 4 the chunks of readings 2, 3 and 4 speak, with their rows 2, 1 and 0.
    assert actions[4] == pytest.approx([weights @ [2, 3, 4] / weights.sum(), weights @ [2, 1, 0] / weights.sum()])
    assert actions[0].tolist() == [0, 0]
    assert actions[1] == pytest.approx([weights[:2] @ [0, 1] / weights[:2].sum()] * 1 + [1 / (1 + np.exp(-0.5))])


def test_real_time_goes_on_with_the_last_chunk_while_the_new_one_is_on_its_way():
    horizon, execute, delay = 8, 3, 2
    actions, _ = drive(RealTimeChunks(Labelled(horizon), execute_steps=execute, delay_steps=delay), range(6))
    weights = overlap_weights(horizon, execute_steps=execute, delay_steps=delay)
    assert actions[:3].tolist() == [[0, 0], [0, 1], [0, 2]]
    assert actions[3:5].tolist() == [[0, 3], [0, 4]], "the prefix was committed when the chunk of step 3 was asked for"
    assert actions[5] == pytest.approx([(1 - weights[2]) * 3, weights[2] * 5 + (1 - weights[2]) * 2])


def test_overlap_weights_are_the_papers():
    weights = overlap_weights(8, execute_steps=3, delay_steps=2)
    c = (8 - 3 - np.arange(2, 5)) / (8 - 3 - 2 + 1)
    assert weights[:2].tolist() == [1, 1]
    assert weights[2:5] == pytest.approx(c * (np.exp(c) - 1) / (np.e - 1))
    assert weights[5:].tolist() == [0, 0, 0]


def test_without_delay_a_last_chunk_that_ended_has_no_say():
    actions, _ = drive(RealTimeChunks(Labelled(3), execute_steps=3), range(7))
    assert actions.tolist() == drive(OpenLoop(Labelled(3)), range(7))[0].tolist()


EXECUTIONS = (
    ChunkExecution(),
    ChunkExecution(execute_steps=2),
    ChunkExecution(rule="temporal_ensemble"),
    ChunkExecution(rule="real_time", delay_steps=2),
)


@pytest.mark.parametrize("execution", EXECUTIONS, ids=str)
@pytest.mark.parametrize("context_steps", [1, 3])
@pytest.mark.parametrize("now", [13, 14, 15, 16])
def test_replayed_context_rebuilds_the_state(execution: ChunkExecution, context_steps: int, now: int):
    policy = execution.wrap(Labelled(5, context_steps=context_steps))
    readings = np.random.default_rng(0).normal(size=30)
    whole, _ = drive(policy, readings)
    first = now + 1 - policy.context_steps
    replayed, _ = drive(policy, readings[first:], first=first)
    np.testing.assert_allclose(replayed[now - first :], whole[now:], rtol=1e-6)


@pytest.mark.parametrize("execution", EXECUTIONS, ids=str)
def test_rows_at_different_steps_do_not_touch_each_other_and_states_stay_what_they_were(execution: ChunkExecution):
    policy = execution.wrap(Labelled(5, context_steps=2))
    alone = [drive(policy, readings)[0][-1] for readings in ([1, 2, 3, 4, 5], [9, 8, 7])]
    states = [drive(policy, [1, 2, 3, 4])[1], drive(policy, [9, 8])[1]]
    before = [(state.chunks.copy(), state.ages.copy(), state.timestep) for state in states]
    for _ in range(2):
        chunks, _ = policy.act([observe(5), observe(7)], states)
        np.testing.assert_array_equal(np.stack([chunk[0] for chunk in chunks]), alone)
    for state, (held, ages, timestep) in zip(states, before, strict=True):
        np.testing.assert_array_equal(state.chunks, held)
        np.testing.assert_array_equal(state.ages, ages)
        assert state.timestep == timestep
        with pytest.raises(ValueError, match="read-only"):
            state.chunks[...] = 0


def test_a_policy_with_memory_sees_every_observation_and_what_was_executed():
    inner = Labelled(4, context_steps=3)
    actions, state = drive(OpenLoop(inner), range(3))
    assert inner.num_asked == 3
    assert state.policy.readings == (0, 1, 2)
    assert state.policy.told.tolist() == actions[1].tolist()


def test_what_the_robot_says_it_executed_goes_before_what_was_returned():
    policy = TemporalEnsemble(Labelled(2))
    _, (state,) = policy.act([observe(0)], [policy.initial_state()])
    executed = np.array([5, 5], np.float32)
    _, (state,) = policy.act([replace(observe(1), previous_action=executed)], [state])
    assert state.policy.told.tolist() == [5, 5]


def test_discrete_chunks_vote():
    spec = replace(SPEC, action_kind="discrete")

    class Changing(Labelled):
        def act(self, observations, states, *, generator=None):
            choices = np.array([int(o.proprio[0]) for o in observations])
            return [np.eye(2, dtype=np.float32)[[c] * self.horizon] for c in choices], list(states)

    actions, _ = drive(TemporalEnsemble(Changing(3, spec=spec)), [0, 0, 1, 1])
    assert actions.tolist() == [[1, 0], [1, 0], [1, 0], [0, 1]]


def test_a_policy_of_single_steps_is_left_as_it_is():
    plain = FakePolicy(make_spec(proprio_dim=1))
    expected, _ = drive(plain, range(5))
    for execution in (ChunkExecution(), ChunkExecution(rule="temporal_ensemble"), ChunkExecution(rule="real_time")):
        np.testing.assert_array_equal(drive(execution.wrap(plain), range(5))[0], expected)


@pytest.mark.parametrize(
    ("build", "complaint"),
    [
        (lambda: OpenLoop(Labelled(4), execute_steps=5), "within 1..4"),
        (lambda: OpenLoop(Labelled(4), execute_steps=0), "within 1..4"),
        (lambda: TemporalEnsemble(Labelled(4), decay=-0.1), "at least 0"),
        (lambda: RealTimeChunks(Labelled(4), execute_steps=1, delay_steps=2), "must hold"),
        (lambda: RealTimeChunks(Labelled(4), execute_steps=3, delay_steps=2), "must hold"),
        (lambda: ChunkExecution(rule="guess"), "open_loop"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_settings_that_cannot_work_are_refused(build, complaint: str):
    with pytest.raises(ConfigError, match=complaint):
        build()


def test_a_chunk_of_another_shape_is_refused():
    class Short(Labelled):
        def act(self, observations, states, *, generator=None):
            chunks, after = super().act(observations, states)
            return [chunk[:-1] for chunk in chunks], after

    policy = OpenLoop(Short(4))
    with pytest.raises(DataError, match="expected"):
        policy.act([observe(0)], [policy.initial_state()])
