"""From finished episodes to the replay: exactly once, at the replay's pace, and without losing what it cannot take.

consumes: whole episodes. waits for: the replay, then for nothing. unblocked by: the replay, or the end of its patience,
after which episodes go to the disk and follow when the replay takes them again.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from vla_dist.core.errors import ConfigError, DataError, IntegrityError, NotFound, ReplayWait, Unreachable
from vla_dist.core.protocols import AppendResult
from vla_dist.core.types import Segment
from vla_dist.rllib.spill import EpisodeSpill

_log = logging.getLogger(__name__)

EpisodeSegments = Sequence[Segment]
"""Of one whole episode, in order."""


class SegmentSink(Protocol):
    def append_all(self, segments: Sequence[Segment], *, timeout_s: float) -> list[AppendResult]:
        """See ``RedisReplayTable.append_all``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxConfig:
    """How long sampling is held up, and how much may wait on disk."""

    patience_s: float = 5.0
    """Longest wait of one sample for a replay that took the last one. This is the back-pressure: a limiter that holds
    inserts back slows sampling down."""
    retry_after_s: float = 5.0
    """After a refusal the replay is left alone this long."""
    retry_patience_s: float = 0.5
    """Longest wait of one sample for a replay that refused the last time."""
    max_spill_bytes: int = 8 << 30
    """On disk; beyond it sampling waits."""
    stall_timeout_s: float = 300.0
    """Longest wait with the disk's share used up; then the sample fails."""

    def __post_init__(self) -> None:
        for name in ("patience_s", "retry_patience_s", "stall_timeout_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} {getattr(self, name)} must be above 0")
        if self.retry_after_s < 0 or self.max_spill_bytes < 0:
            raise ConfigError(
                f"retry_after_s {self.retry_after_s} and max_spill_bytes {self.max_spill_bytes} must not be negative"
            )


@dataclass(slots=True, kw_only=True)
class OutboxCounts:
    """Since the outbox was made; episodes."""

    stored: int = 0
    """By this process, those included that had been spilled before."""
    spilled: int = 0
    """To disk, ever."""
    refused: int = 0
    """That no replay can take, for example with a reward that is not finite; the log names them."""
    waited_s: float = 0.0
    """For the replay."""


class Outbox:
    """Not safe for several threads."""

    def __init__(
        self,
        sink: SegmentSink,
        spill: EpisodeSpill,
        config: OutboxConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sink = sink
        self._spill = spill
        self._config = config
        self._clock = clock
        self._pending: list[EpisodeSegments] = []
        self._is_refusing = False
        self._left_alone_until = float("-inf")
        self.counts = OutboxCounts()

    def put(self, episodes: Sequence[EpisodeSegments]) -> None:
        """Return once each is in the replay or on disk; what is on disk follows when the replay takes it.

        Blocking: as ``OutboxConfig`` says.

        Raises:
            ReplayWait: the replay takes nothing and the disk's share is used up. The episodes are kept: the next call
                tries them again.
            Unreachable: the replay takes nothing and the disk cannot be written, likewise.
        """
        self._pending += [episode for episode in episodes if self._is_storable(episode)]
        if self._pending and not self._deliver(self._pending, self._next_patience_s()):
            self._set_aside()
        self._pending = []
        if not self._is_refusing:
            self._follow_up()

    def flush(self, *, timeout_s: float) -> int:
        """Try now to bring all that waits into the replay; the files that still wait."""
        end = self._clock() + timeout_s
        self._left_alone_until, self._is_refusing = float("-inf"), False
        self.put([])
        while self._spill.names() and self._clock() < end:
            self._left_alone_until, self._is_refusing = float("-inf"), False
            self._follow_up()
        return len(self._spill.names())

    def _set_aside(self) -> None:
        if self._spill.num_bytes < self._config.max_spill_bytes:
            self._spill.put(self._pending)
            self.counts.spilled += len(self._pending)
            return
        end = self._clock() + self._config.stall_timeout_s
        while True:
            left_s = end - self._clock()
            if left_s <= 0:
                raise ReplayWait(
                    f"the replay took no episode for {self._config.stall_timeout_s:.0f} s and {self._spill.num_bytes} "
                    f"bytes wait on disk, the most allowed ({self._config.max_spill_bytes}); is a learner sampling, "
                    "and is the server up? Raise max_spill_bytes to collect without them"
                )
            if self._deliver(self._pending, min(left_s, self._config.patience_s)):
                return

    def _follow_up(self) -> None:
        """Deliver from disk for as long as one sample may be held up."""
        end = self._clock() + self._config.patience_s
        for name in self._spill.names():
            left_s = end - self._clock()
            if left_s <= 0:
                return
            try:
                episodes = self._spill.read(name)
            except NotFound:
                continue
            except IntegrityError as error:
                _log.error("%s", error)
                continue
            if not self._deliver(episodes, left_s):
                return
            self._spill.remove(name)

    def _next_patience_s(self) -> float:
        if not self._is_refusing:
            return self._config.patience_s
        return self._config.retry_patience_s if self._clock() >= self._left_alone_until else 0.0

    def _is_storable(self, episode: EpisodeSegments) -> bool:
        try:
            self._spill.check(episode)
        except DataError as error:
            _log.error("episode %s is left out of the replay: %s", episode[0].episode_id, error)
            self.counts.refused += 1
            return False
        return True

    def _deliver(self, episodes: Sequence[EpisodeSegments], timeout_s: float) -> bool:
        """Whether the replay has them all; a repeated delivery changes nothing."""
        if timeout_s <= 0:
            return False
        started = self._clock()
        try:
            self._sink.append_all([segment for episode in episodes for segment in episode], timeout_s=timeout_s)
        except (ReplayWait, Unreachable) as error:
            if not self._is_refusing:
                _log.warning("episodes go to the disk until the replay takes them again: %s", error)
            self._is_refusing = True
            self._left_alone_until = self._clock() + self._config.retry_after_s
            return False
        finally:
            self.counts.waited_s += self._clock() - started
        if self._is_refusing:
            _log.warning("the replay takes episodes again")
        self._is_refusing = False
        self.counts.stored += len(episodes)
        return True
