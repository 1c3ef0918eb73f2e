"""Keeping a client's copy of the index up to date from the buffer's streams.

consumes: the streams of complete episodes, of departures and of the table's events. waits for: nothing. A copy that
fell too far behind starts again from what is stored.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vla_dist.core.types import Array
from vla_dist.replay.index import EpisodeIndex
from vla_dist.replay.keys import Keys
from vla_dist.replay.link import Deadline, RedisLink
from vla_dist.replay.samplers import Draw, PrioritisedDraw
from vla_dist.replay.state import BufferState
from vla_dist.replay.wire import Command

_PAGE = 2000
_RING_BYTES = 1 << 22


class _FellBehind(Exception):
    """Departures or events were trimmed before this copy saw them, or the server may not be where it was."""


class IndexFollower:
    """One table's view of the buffer. Not safe for several threads: its owner locks."""

    def __init__(
        self, link: RedisLink, keys: Keys, table: int, sampler: Draw, *, num_steps: int, capacity: int, max_draws: int
    ) -> None:
        """
        Args:
            table: its index.
            sampler: told of new priorities.
            num_steps: T.
            capacity: of the buffer, in steps; size of the rings of priorities and draws.
            max_draws: 0 for no limit.
        """
        self.index = EpisodeIndex(num_steps)
        self.sampler = sampler
        self._link = link
        self._keys = keys
        self._table = table
        self._capacity = capacity
        self._max_draws = max_draws
        self._has_events = bool(max_draws) or isinstance(sampler, PrioritisedDraw)
        self._started = False
        self._live = self._gone = self._events = self._breaks = 0

    def exchange(self, first: Sequence[Command], deadline: Deadline) -> list[Any]:
        """Bring the copy up to date; in the same round trip, and before that, do ``first``. Returns its replies."""
        replies: list[Any] = []
        while True:
            if not self._started:
                self._start(deadline)
            try:
                # `first` may charge the limiter: it must not be sent a second time.
                replies += self._step([] if replies else first, deadline)
                return replies
            except _FellBehind as behind:
                replies += behind.args[0]
                self._started = False

    def _start(self, deadline: Deadline) -> None:
        """Everything from what is stored: episodes, then priorities and draws, before anything is drawn."""
        # Taken before anything is read: what breaks from now on makes this copy start again.
        self._breaks = self._link.num_breaks
        tails: list[Command] = [("XREVRANGE", self._keys.gone, "+", "-", "COUNT", 1)]
        if self._has_events:
            tails.append(("XREVRANGE", self._keys.of_table("events", self._table), "+", "-", "COUNT", 1))
        answers = self._link.call(tails, timeout_s=deadline.left_s)
        self._gone, self._events = (
            _sequence(answer[0][0]) if answer else 0 for answer in (answers[0], answers[1] if self._has_events else [])
        )
        self.index.clear()
        self._live = 0
        while self._take_live(
            self._link.call([self._range(self._keys.live, self._live)], timeout_s=deadline.left_s)[0]
        ):
            pass
        numbers = self.index.rows["number"]
        if isinstance(self.sampler, PrioritisedDraw):
            (packed,) = self._link.call([("GET", self._keys.state)], timeout_s=deadline.left_s)
            top = BufferState.unpack(packed, self._keys.prefix).tables[self._table].max_priority
            # Of no row: the one with the highest priority so far may have left.
            self.sampler.score(self.index, np.array([-1]), np.array([top]))
            self.sampler.score(self.index, numbers, self._ring("priorities", "<f4", numbers, deadline))
        if self._max_draws:
            self.index.use_up(numbers[self._ring("draws", "<u4", numbers, deadline) >= self._max_draws])
        self._started = True

    def _step(self, first: Sequence[Command], deadline: Deadline) -> list[Any]:
        commands: list[Command] = [
            *first,
            self._range(self._keys.live, self._live),
            self._range(self._keys.gone, self._gone),
        ]
        if self._has_events:
            commands.append(self._range(self._keys.of_table("events", self._table), self._events))
        replies = self._link.call(commands, timeout_s=deadline.left_s)
        answers, live, gone = replies[: len(first)], replies[len(first)], replies[len(first) + 1]
        if self._link.num_breaks != self._breaks:
            # After a restart from an older log the same completions may stand for other episodes.
            raise _FellBehind(answers)
        while self._take_live(live):
            live = self._link.call([self._range(self._keys.live, self._live)], timeout_s=deadline.left_s)[0]
        self._gone = self._require_next(gone, self._gone, answers)
        if gone:
            self.index.remove(np.frombuffer(b"".join(fields[1] for _, fields in gone), "<f8").astype(np.int64))
        if self._has_events:
            events = replies[-1]
            self._events = self._require_next(events, self._events, answers)
            for _, (kind, packed) in events:
                self._take_event(kind, packed)
        if len(gone) == _PAGE or (self._has_events and len(replies[-1]) == _PAGE):
            try:
                self._step([], deadline)
            except _FellBehind as behind:
                raise _FellBehind(answers) from behind  # What `first` was told must not get lost on the way.
        return answers

    def _take_live(self, entries: Sequence[Any]) -> bool:
        """Whether there may be more."""
        self.index.add([fields[1] for _, fields in entries])
        if entries:
            self._live = _sequence(entries[-1][0])
        return len(entries) == _PAGE

    def _take_event(self, kind: bytes, packed: bytes) -> None:
        if kind == b"p" and isinstance(self.sampler, PrioritisedDraw):
            pairs = np.frombuffer(packed, "<f8").reshape(-1, 2)
            self.sampler.score(self.index, pairs[:, 0].astype(np.int64), pairs[:, 1])
        elif kind == b"x":
            self.index.use_up(np.frombuffer(packed, "<f8").astype(np.int64))

    def _ring(self, kind: str, dtype: str, numbers: Array, deadline: Deadline) -> Array:
        """(N,) what the table's ring of 4-byte values holds for these rows."""
        key, parts, at = self._keys.of_table(kind, self._table), [], 0
        while True:
            (part,) = self._link.call([("GETRANGE", key, at, at + _RING_BYTES - 1)], timeout_s=deadline.left_s)
            parts.append(part)
            at += len(part)
            if len(part) < _RING_BYTES:
                break
        ring = np.frombuffer(b"".join(parts), dtype)
        places = numbers % self._capacity
        values = np.zeros(len(numbers), dtype)
        inside = places < len(ring)
        values[inside] = ring[places[inside]]
        return values

    @staticmethod
    def _range(key: str, after: int) -> Command:
        return ("XRANGE", key, f"({after}-0", "+", "COUNT", _PAGE)

    @staticmethod
    def _require_next(entries: Sequence[Any], after: int, answers: list[Any]) -> int:
        if not entries:
            return after
        if _sequence(entries[0][0]) != after + 1:
            raise _FellBehind(answers)
        return _sequence(entries[-1][0])


def _sequence(entry_id: bytes) -> int:
    return int(entry_id.split(b"-")[0])
