"""What a robot keeps of its episode so that any server can go on with it: answered observations, and a state."""

from collections import deque

from vla_dist.protocol.v1 import policy_pb2, types_pb2


class EpisodeMemory:
    """The last K answered observations, counted, and the newest state that a server attached to an answer."""

    def __init__(self) -> None:
        self._history: deque[types_pb2.Observation] = deque(maxlen=0)
        self._state: policy_pb2.PolicyState | None = None
        self.num_steps = 0
        """Answered observations of the episode, those that left the history included."""

    def keep(self, context_steps: int) -> None:
        """Set K, as granted."""
        if self._history.maxlen != context_steps:
            self._history = deque(self._history, maxlen=context_steps)

    def add(self, observation: types_pb2.Observation, state: policy_pb2.PolicyState | None = None) -> None:
        """An observation that was answered with a chunk, and what came along with the chunk."""
        self._history.append(observation)
        self.num_steps += 1
        if state is not None and state.num_steps == self.num_steps:
            self._state = state

    def since(self, num_steps: int) -> list[types_pb2.Observation]:
        """The observations answered after the first ``num_steps``, oldest first, as far as they are kept."""
        wanted = min(self.num_steps - num_steps, len(self._history))
        return list(self._history)[len(self._history) - wanted :]

    def opening(self, session: policy_pb2.OpenSessionRequest) -> policy_pb2.ControlOpen:
        """The first message of a stream that goes on with the episode."""
        state, history = self._state, list(self._history)
        if state is not None and self.num_steps - state.num_steps <= len(history):
            history = self.since(state.num_steps)
        else:
            state = None
        return policy_pb2.ControlOpen(
            session=session, history=history, history_start=self.num_steps - len(history), state=state
        )
