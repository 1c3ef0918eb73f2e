"""Episodes that are stored, but not whole: telling them from evicted ones, and letting go of them."""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from vla_dist.core.errors import VlaDistError
from vla_dist.core.types import Array
from vla_dist.replay.keys import Keys
from vla_dist.replay.link import RedisLink
from vla_dist.replay.wire import Command

if TYPE_CHECKING:
    from vla_dist.replay.episodes import Entry, EpisodeReader

_GRACE_S = 1.0
"""A writer that sees its images vanish between upload and commit brings them again within this time."""
_PAGE = 64
_MOST_MISSED = 10_000
_log = logging.getLogger(__name__)


class LossCheck:
    """Finds episodes of one buffer that lack a part of their payload; threads may share it.

    A payload that is missing once was evicted between draw and fetch. If its episode is drawn again afterwards, it was
    still stored, so the payload is lost: the server of the images was restarted without its data, for example. Then all
    episodes are looked at, those that lack something a second time after a grace, and what still lacks it is discarded.
    """

    def __init__(
        self,
        reader: "EpisodeReader",
        link: RedisLink,
        images: RedisLink,
        keys: Keys,
        *,
        num_cameras: int,
        discard: Callable[[int], bool],
    ) -> None:
        """
        Args:
            reader: of the buffer.
            link: to the rows.
            images: to the frames; may be the same.
            keys: of the buffer.
            num_cameras: frames of so many belong to each segment.
            discard: removes an episode by its completion where it is still stored, and says whether it was.
        """
        self._reader = reader
        self._link = link
        self._images = images
        self._keys = keys
        self._num_cameras = num_cameras
        self._discard = discard
        self._lock = threading.Lock()
        self._missed: set[int] = set()
        self._looking = threading.Lock()
        self._round: Iterator[bool] | None = None
        self._timeout_s = 0.0
        self._suspects: list[Entry] = []
        self.discarded = 0
        """Episodes that this client discarded."""

    def note(self, completions: Array) -> bool:
        """Payloads of these episodes were missing; True where one of them was missing before."""
        missed = set(completions.tolist())
        with self._lock:
            again = not missed.isdisjoint(self._missed)
            self._missed |= missed
            if len(self._missed) > _MOST_MISSED:
                self._missed = missed
        return again

    def look(self, *, timeout_s: float, until_s: float = math.inf) -> bool:
        """Go on with the look through all episodes; whether it came to its end.

        It returns early where the grace is not over or another thread is at it: call again.

        Args:
            timeout_s: for each page of the episodes.
            until_s: on the monotonic clock, when to stop in the middle.
        """
        if not self._looking.acquire(blocking=False):
            return False
        try:
            self._timeout_s = timeout_s
            self._round = self._round or self._look_at_all()
            for must_wait in self._round:
                if must_wait or time.monotonic() > until_s:
                    return False
            self._round = None
            return True
        except VlaDistError:
            # A round that was cut off cannot go on.
            self._round = None
            raise
        finally:
            self._looking.release()

    def look_to_the_end(self, *, timeout_s: float) -> int:
        """A look through all episodes, grace included; returns how many were discarded."""
        before = self.discarded
        while not self.look(timeout_s=timeout_s):
            time.sleep(_GRACE_S / 10)
        return self.discarded - before

    @property
    def reason(self) -> str:
        """In words, what is wrong with the episodes under suspicion; empty without any."""
        if not self._suspects:
            return ""
        return (
            f"{len(self._suspects)} stored episodes lack a part of their payload, which is looked for on Redis at "
            f"{self._images.address} (was it restarted without its data?); they are about to be discarded"
        )

    def _look_at_all(self) -> Iterator[bool]:
        """One round; yields between its pieces, True where nothing can be done yet."""
        self._suspects = []
        page: list[Entry] = []
        for entry in self._reader.entries(timeout_s=self._timeout_s):
            page.append(entry)
            if len(page) == _PAGE:
                self._suspects += self._incomplete(page)
                page = []
                yield False
        self._suspects += self._incomplete(page)
        end = time.monotonic() + _GRACE_S
        while self._suspects and time.monotonic() < end:
            yield True
        lost = self._incomplete(self._suspects)
        # Only while it is stored: an evicted one is no loss.
        discarded = sum(self._discard(entry["completion"]) for entry in lost)
        self.discarded += discarded
        self._suspects = []
        with self._lock:
            self._missed.clear()
        if discarded:
            _log.warning(
                "%d episodes were discarded: part of their payload was missing on Redis at %s; was it restarted "
                "without its data?",
                discarded,
                self._images.address,
            )

    def _incomplete(self, entries: "Sequence[Entry]") -> "list[Entry]":
        if not entries:
            return []
        rows: list[Command] = []
        frames: list[Command] = []
        for entry in entries:
            digest, indices = entry["digest"], range(entry["num_segments"])
            rows.append(("EXISTS", *(self._keys.row(digest, i) for i in indices)))
            names = [self._keys.image(digest, i, camera) for i in indices for camera in range(self._num_cameras)]
            frames.append(("EXISTS", *names))
        found = self._link.call(rows, timeout_s=self._timeout_s)
        seen = self._images.call(frames, timeout_s=self._timeout_s) if self._num_cameras else [0] * len(entries)
        return [
            entry
            for entry, num_rows, num_frames in zip(entries, found, seen, strict=True)
            if num_rows < entry["num_segments"] or num_frames < entry["num_segments"] * self._num_cameras
        ]
