"""Which observations of a session are on their way, and which answer is still waited for."""

from dataclasses import dataclass

from vla_dist.core.types import ActionChunk
from vla_dist.protocol.v1 import policy_pb2, types_pb2

Answer = ActionChunk | policy_pb2.ControlRefusal


@dataclass(slots=True)
class _Sent:
    """An observation on its way."""

    message: types_pb2.Observation
    give_up_at: float
    """By ``time.monotonic``."""


class PendingAnswers:
    """One answer is awaited at a time; others that come are late. The session's lock guards all of it."""

    def __init__(self) -> None:
        self._sent: dict[int, _Sent] = {}
        self._answers: dict[int, Answer] = {}
        self._repeated: set[int] = set()
        self._awaited = -1

    def expect(self, observation_id: int, message: types_pb2.Observation, *, give_up_at: float) -> None:
        """The answer that is awaited from now on."""
        self._awaited = observation_id
        self._sent[observation_id] = _Sent(message, give_up_at)

    def expect_nothing(self) -> None:
        """Whatever comes now is late."""
        self._awaited = -1

    def repeat(self, observation_id: int) -> None:
        """This one is asked a second time, on a new stream, only so that its memory has it."""
        self._repeated.add(observation_id)

    def is_repeat(self, observation_id: int) -> bool:
        """Whether the answer is one to ``repeat``; true once."""
        was = observation_id in self._repeated
        self._repeated.discard(observation_id)
        return was

    def settle(self, observation_id: int, answer: Answer) -> tuple[types_pb2.Observation | None, bool]:
        """The observation that was answered, None where it is unknown or was answered before, as by what comes twice;
        and whether the answer is the awaited one."""
        sent = self._sent.pop(observation_id, None)
        if sent is None:
            return None, False
        is_awaited = observation_id == self._awaited
        if is_awaited:
            self._answers[observation_id] = answer
        return sent.message, is_awaited

    def has(self, observation_id: int) -> bool:
        return observation_id in self._answers

    def take(self, observation_id: int) -> Answer | None:
        return self._answers.pop(observation_id, None)

    def forget(self) -> None:
        """The stream is another now: what was on its way is lost."""
        self._sent.clear()
        self._repeated.clear()

    def oldest_give_up_at(self) -> float | None:
        """When the oldest observation without an answer was given up, or will be."""
        return min((sent.give_up_at for sent in self._sent.values()), default=None)
