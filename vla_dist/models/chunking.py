"""Policies of chunks as policies of single steps: which predicted action is executed, when a new chunk is asked for.

Shapes: H chunk horizon, A action, N chunks in flight. A chunk's row i is the action i steps after its observation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, Protocol, TypeVar, get_args

import numpy as np

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.core.protocols import Policy
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Array, Observation

S = TypeVar("S")
ChunkRule = Literal["open_loop", "temporal_ensemble", "real_time"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkExecution:
    """How chunks are executed, as settings."""

    rule: ChunkRule = "open_loop"
    execute_steps: int | None = None
    """Steps from one chunk to the next; None: all H of ``open_loop``, half of H of ``real_time``. The ensemble asks at
    every step."""
    decay: float = 0.01
    """m of ``temporal_ensemble``: the i-th oldest chunk weighs exp(-m i)."""
    delay_steps: int = 0
    """d of ``real_time``: steps that pass between an observation and its chunk's arrival, ceil(latency x rate)."""

    def __post_init__(self) -> None:
        if self.rule not in get_args(ChunkRule):
            raise ConfigError(f"chunk rule {self.rule!r} must be one of {', '.join(get_args(ChunkRule))}")

    def wrap(self, policy: Policy[Any]) -> "Policy[Any]":
        """The policy that gives one action a step. Raises ConfigError where its horizon does not allow the settings."""
        if self.rule == "temporal_ensemble":
            return TemporalEnsemble(policy, decay=self.decay)
        if self.rule == "real_time":
            steps = self.execute_steps or max(1, self.delay_steps, policy.horizon // 2)
            return RealTimeChunks(policy, execute_steps=steps, delay_steps=self.delay_steps)
        return OpenLoop(policy, execute_steps=self.execute_steps)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExecutionState(Generic[S]):
    """What one robot's executor remembers; the arrays are read-only."""

    policy: S
    """The wrapped policy's own state."""
    chunks: Array
    """(N, H, A) float32 raw units, oldest first; N is 0 before the first observation."""
    ages: Array
    """(N,) int64, steps since each chunk's observation, as of the next one."""
    timestep: int
    """Index within the episode of the next observation."""
    action: Array | None = None
    """(A,) float32 that was returned last."""


class _Rule(Protocol):
    def is_due(self, state: ExecutionState[Any]) -> bool:
        """Whether the coming observation gets a chunk."""
        ...

    def take(self, state: ExecutionState[Any], chunk: Array | None) -> tuple[Array, Array, Array]:
        """The chunks and ages to keep, counted as of this observation, and the (A,) action to execute."""
        ...


class _Executor(Generic[S]):
    """The policy's side of every rule: rows may be at different points of their chunks."""

    def __init__(self, policy: Policy[S], rule: _Rule, *, reach_steps: int) -> None:
        self._policy = policy
        self._rule = rule
        self._reach_steps = reach_steps

    @property
    def spec(self) -> EnvSpec:
        return self._policy.spec

    @property
    def horizon(self) -> int:
        return 1

    @property
    def context_steps(self) -> int:
        """K of the policy, and before these the steps whose chunks still reach into the present."""
        return self._policy.context_steps + self._reach_steps

    @property
    def remembers_episode(self) -> bool:
        """Whether the policy's own memory reaches further back than any number of observations."""
        return getattr(self._policy, "remembers_episode", False)

    def initial_state(self, *, timestep: int = 0) -> ExecutionState[S]:
        horizon, action_dim = self._policy.horizon, self._policy.spec.action_dim
        return ExecutionState(
            policy=self._policy.initial_state(timestep=timestep),
            chunks=_frozen(np.zeros((0, horizon, action_dim), np.float32)),
            ages=_frozen(np.zeros(0, np.int64)),
            timestep=timestep,
        )

    def act(
        self,
        observations: Sequence[Observation],
        states: Sequence[ExecutionState[S]],
        *,
        generator: np.random.Generator | None = None,
    ) -> tuple[list[Array], list[ExecutionState[S]]]:
        """B observations and states to B chunks (1, A) in raw units and B new states.

        A policy that remembers more than one step is shown every observation, so that its context has no gaps; one
        that does not is only asked when a chunk is due.

        Raises:
            DataError: the policy's chunk has another shape than it promised.
        """
        told = [_with_action(one, state) for one, state in zip(observations, states, strict=True)]
        is_due = [self._rule.is_due(state) for state in states]
        asked = [row for row, due in enumerate(is_due) if due or self._policy.context_steps > 1]
        answers, after = self._policy.act(
            [told[row] for row in asked], [states[row].policy for row in asked], generator=generator
        )
        chunks: dict[int, Array] = {}
        inner = {row: state.policy for row, state in enumerate(states)}
        for row, answer, state in zip(asked, answers, after, strict=True):
            inner[row] = state
            if is_due[row]:
                chunks[row] = self._checked(answer)
        actions, advanced = [], []
        for row, state in enumerate(states):
            kept, ages, action = self._rule.take(state, chunks.get(row))
            action = self._executable(action)
            actions.append(action[None])
            advanced.append(
                ExecutionState(
                    policy=inner[row],
                    chunks=_frozen(kept),
                    ages=_frozen(ages + 1),
                    timestep=state.timestep + 1,
                    action=_frozen(action),
                )
            )
        return actions, advanced

    def _checked(self, chunk: Array) -> Array:
        expected = (self._policy.horizon, self._policy.spec.action_dim)
        if chunk.shape != expected:
            raise DataError(f"the policy gave a chunk of shape {chunk.shape}, expected (H, A) = {expected}")
        return chunk.astype(np.float32)

    def _executable(self, action: Array) -> Array:
        """A mixture of one-hot rows is a vote."""
        if self._policy.spec.action_kind == "discrete":
            return np.eye(len(action), dtype=np.float32)[action.argmax()]
        return np.array(action, np.float32)


class OpenLoop(_Executor[S]):
    """Executes ``execute_steps`` actions of a chunk and asks for the next one.

    Chunks are asked for at multiples of ``execute_steps`` within the episode, so that replayed observations rebuild the
    state.
    """

    def __init__(self, policy: Policy[S], *, execute_steps: int | None = None) -> None:
        """Args:
            execute_steps: None: the whole chunk.

        Raises:
            ConfigError: it is not within 1..H.
        """
        steps = policy.horizon if execute_steps is None else execute_steps
        if not 1 <= steps <= policy.horizon:
            raise ConfigError(f"execute_steps {steps} must be within 1..{policy.horizon}, the policy's horizon")
        kept = np.zeros(policy.horizon, np.float32)
        super().__init__(policy, _Replanning(steps, kept), reach_steps=steps - 1)


class TemporalEnsemble(_Executor[S]):
    """Asks at every step and averages what all chunks in flight say about it, weights exp(-m i), i = 0 the oldest.

    Source: Zhao et al. 2023, "Learning Fine-Grained Bimanual Manipulation" (ACT), section IV-A and algorithm 2.
    """

    def __init__(self, policy: Policy[S], *, decay: float = 0.01) -> None:
        """Raises ConfigError where the decay is negative: then the newest chunk would be heaviest."""
        if not (np.isfinite(decay) and decay >= 0):
            raise ConfigError(f"decay {decay} must be at least 0; 0 weighs all chunks alike")
        super().__init__(policy, _Averaging(policy.horizon, decay), reach_steps=policy.horizon - 1)


class RealTimeChunks(_Executor[S]):
    """Hides the time that a chunk takes: while it is computed, the last one goes on, and the new one joins onto it.

    A chunk asked for every s steps arrives d steps after its observation. Its first d rows are by then executed, so
    they are committed to what the last chunk said; rows up to H - s, where both have an opinion, move from the last
    chunk to the new one, and the rest is new.

    Source: Black et al. 2025, "Real-Time Execution of Action Chunking Flow Policies", equation 5. There the weights
    guide the denoising of a flow policy; here they mix the finished chunks, so that any policy will do.
    """

    def __init__(self, policy: Policy[S], *, execute_steps: int, delay_steps: int = 0) -> None:
        """Args:
            execute_steps: s.
            delay_steps: d.

        Raises:
            ConfigError: d <= s <= H - d does not hold: a chunk would come too late, or end too early.
        """
        horizon = policy.horizon
        if not (delay_steps >= 0 and max(1, delay_steps) <= execute_steps <= horizon - delay_steps):
            raise ConfigError(
                f"delay_steps {delay_steps} <= execute_steps {execute_steps} <= {horizon - delay_steps} (the horizon "
                f"{horizon} less the delay) must hold; predict longer chunks, or answer faster"
            )
        kept = overlap_weights(horizon, execute_steps=execute_steps, delay_steps=delay_steps)
        super().__init__(policy, _Replanning(execute_steps, kept), reach_steps=horizon - 1)


def overlap_weights(horizon: int, *, execute_steps: int, delay_steps: int) -> Array:
    """(H,) float32 weight of the last chunk in each row of the new one: 1 while committed, then falling to 0.

    Source: Black et al. 2025, equation 5.
    """
    row = np.arange(horizon)
    falling = (horizon - execute_steps - row) / (horizon - execute_steps - delay_steps + 1)
    soft = falling * np.expm1(np.clip(falling, 0, 1)) / np.expm1(1.0)
    weights = np.where(row < delay_steps, 1.0, np.where(row < horizon - execute_steps, soft, 0.0))
    return weights.astype(np.float32)


@dataclass(frozen=True, slots=True)
class _Replanning:
    """A new chunk every ``execute_steps``; row i of it is the last chunk's opinion by ``kept[i]``."""

    execute_steps: int
    kept: Array

    def is_due(self, state: ExecutionState[Any]) -> bool:
        return not len(state.chunks) or state.timestep % self.execute_steps == 0

    def take(self, state: ExecutionState[Any], chunk: Array | None) -> tuple[Array, Array, Array]:
        if chunk is None:
            return state.chunks, state.ages, state.chunks[0, state.ages[0]]
        if len(state.chunks):
            last = state.chunks[0, state.ages[0] :]
            kept = self.kept[: len(last), None]
            chunk = np.concatenate([kept * last + (1 - kept) * chunk[: len(last)], chunk[len(last) :]])
        return chunk[None], np.zeros(1, np.int64), chunk[0]


@dataclass(frozen=True, slots=True)
class _Averaging:
    horizon: int
    decay: float

    def is_due(self, state: ExecutionState[Any]) -> bool:
        return True

    def take(self, state: ExecutionState[Any], chunk: Array | None) -> tuple[Array, Array, Array]:
        assert chunk is not None
        reaching = state.ages < self.horizon
        chunks = np.concatenate([state.chunks[reaching], chunk[None]])
        ages = np.append(state.ages[reaching], 0)
        weights = np.exp(-self.decay * np.arange(len(chunks)))
        opinions = chunks[np.arange(len(chunks)), ages].astype(np.float64)
        return chunks, ages, (weights @ opinions / weights.sum()).astype(np.float32)


def _with_action(observation: Observation, state: ExecutionState[Any]) -> Observation:
    """The policy returned a chunk, so it must be told which action came of it."""
    if observation.previous_action is not None or state.action is None:
        return observation
    return replace(observation, previous_action=state.action)


def _frozen(array: Array) -> Array:
    view = array.view()
    view.flags.writeable = False
    return view
