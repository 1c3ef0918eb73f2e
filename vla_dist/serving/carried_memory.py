"""What a robot carries of its policy's memory, so that an episode outlives the replica that held it."""

from collections.abc import Sequence
from typing import Any

from vla_dist.core.errors import DataError, IntegrityError
from vla_dist.core.types import Observation
from vla_dist.protocol.records import PolicyState
from vla_dist.serving.sessions import Session
from vla_dist.serving.state_sealing import StateSeal
from vla_dist.serving.versions import LoadedPolicy


class CarriedMemory:
    """Which observations and states robots keep, and where an episode's memory begins again from them.

    A policy that remembers a bounded number of steps is rebuilt from its last observations. One that remembers the
    whole episode is sent along as a sealed state every few seconds, with the observations since then.
    """

    def __init__(self, seal: StateSeal, *, state_every_s: float) -> None:
        self._seal = seal
        self._state_every_s = state_every_s

    def context_steps(self, loaded: LoadedPolicy) -> int:
        """Observations that a robot keeps: those that rebuild the memory, or that came after its last state."""
        steps = loaded.policy.context_steps
        return max(steps, self._state_every(loaded)) if _remembers_episode(loaded.policy) else steps

    def due(self, session: Session) -> PolicyState | None:
        """The sealed memory to send along with the answer just given; None where none is needed, or not yet."""
        if not _remembers_episode(session.loaded.policy) or session.num_steps % self._state_every(session.loaded):
            return None
        sealed = self._seal.seal(session.state, label=_label(session.loaded))
        return PolicyState(num_steps=session.num_steps, sealed=sealed)

    def begin(
        self,
        loaded: LoadedPolicy,
        history: Sequence[Observation],
        history_start: int,
        state: PolicyState | None = None,
    ) -> Any:
        """The policy's memory before ``history``, which the caller replays.

        Raises:
            DataError: more history than is kept.
            IntegrityError: a state that this service has not sealed, or that ends elsewhere than the history begins.
        """
        if len(history) > self.context_steps(loaded):
            raise DataError(
                f"the history has {len(history)} observations, expected at most the policy's "
                f"{self.context_steps(loaded)}"
            )
        if state is None:
            return loaded.policy.initial_state(timestep=history_start)
        if history and history_start != state.num_steps:
            raise IntegrityError(
                f"the history begins at step {history_start}, expected {state.num_steps}, where the state ends"
            )
        return self._seal.open(state.sealed, loaded.policy.initial_state(), label=_label(loaded))

    def _state_every(self, loaded: LoadedPolicy) -> int:
        return max(1, round(self._state_every_s * loaded.policy.spec.control_hz))


def _remembers_episode(policy: Any) -> bool:
    """Whether no number of observations rebuilds the memory; most policies do not say, and need none."""
    return getattr(policy, "remembers_episode", False)


def _label(loaded: LoadedPolicy) -> str:
    return f"{loaded.name}@{loaded.version}"
