"""Appending segments: payloads first, under an expiry, then one commit for all of them.

consumes: segments. waits for: the limiters, room, the archive. unblocked by: samples, evictions, the archiver.
"""

import contextlib
import itertools
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from vla_dist.core.errors import DataError, ReplayWait, Unreachable
from vla_dist.core.protocols import AppendResult
from vla_dist.core.types import SOURCES, Segment
from vla_dist.data.segment_codec import EncodedSegment, SegmentCodec
from vla_dist.replay.keys import Keys, episode_digest
from vla_dist.replay.link import Deadline, RedisLink, ServerFull, function_name
from vla_dist.replay.sweeping import ImagesGone
from vla_dist.replay.wire import Command, ReplyError

_STAGE_MS = b"60000"
_IMAGE_STAGE_MS = b"50000"
"""Images go first: what is left of an earlier attempt shows by the checksum of its row."""
_APART_STAGE_MS = b"3600000"
"""Of images on a server of their own: between commit and the removal of the expiry lies another connection."""
_MOST_SEGMENTS = 28
_MOST_BYTES = 16 << 20
"""Stored in one exchange; the next ones are encoded meanwhile."""
MOST_SEGMENTS_PER_EPISODE = 1 << 16
# See functions.lua.
_RUN = struct.Struct("<16sBHHHH")
_ARRIVAL = struct.Struct("<IIBBBdd8s")


@dataclass(slots=True)
class _Item:
    segment: Segment
    encoded: EncodedSegment
    digest: str
    arrival: bytes
    result: AppendResult | None = None
    inserted: bool = False
    """By this call, even if its images had to be brought again."""


class _Batches:
    """Batches in order, of which one may be made before it is asked for."""

    def __init__(self, batches: Iterator[list[_Item]]) -> None:
        self._batches = batches
        self._made: list[_Item] = []

    def make_next(self) -> None:
        self._made = self._made or next(self._batches, [])

    def take(self) -> list[_Item]:
        """The next one, empty after the last."""
        self.make_next()
        made, self._made = self._made, []
        return made


class SegmentWriter:
    """Appends to one buffer; threads may share it."""

    def __init__(self, link: RedisLink, images: RedisLink | None, codec: SegmentCodec, keys: Keys) -> None:
        """
        Args:
            link: to the server of rows and metadata.
            images: to the server of the images; None: the same.
            codec: of the buffer.
            keys: of the buffer.
        """
        self._link = link
        self._images = images
        self._codec = codec
        self._keys = keys
        self._cameras = list(codec.image_codecs)
        self.on_wait: Callable[[], None] = _nothing
        """Called each time the limiter or the archive makes an append wait."""
        self._lock = threading.Lock()
        self._unlinked: list[bytes] = []
        self._images_gone = None if images is None else ImagesGone(link, images, keys, len(self._cameras))

    def append(
        self,
        segments: Sequence[Segment],
        *,
        timeout_s: float,
        frames: Sequence[Mapping[str, bytes | memoryview]] | None = None,
    ) -> list[AppendResult]:
        """Store each once; see ``RedisReplayTable.append_all``."""
        # All are checked before the first byte of any is sent.
        batches = _Batches(self._prepare(segments, frames))
        deadline = Deadline(timeout_s)
        refused: DataError | None = None
        results: list[AppendResult] = []
        while items := batches.take():
            refused = self._store(items, deadline, timeout_s, batches.make_next) or refused
            results.extend(item.result for item in items if item.result is not None)
        if refused is not None:
            raise refused
        return results

    def _prepare(
        self, segments: Sequence[Segment], frames: Sequence[Mapping[str, bytes | memoryview]] | None
    ) -> Iterator[list[_Item]]:
        for segment in segments:
            if segment.segment_index >= MOST_SEGMENTS_PER_EPISODE:
                raise DataError(
                    f"segment_index {segment.segment_index} must be below {MOST_SEGMENTS_PER_EPISODE}; end the "
                    "episode earlier"
                )
        checked = self._codec.check(segments, frames)
        count = max(1, min(_MOST_SEGMENTS, _MOST_BYTES // self._codec.largest_bytes))
        return (
            [
                _Item(segment, encoded, digest, self._arrival(segment, encoded))
                for segment, encoded in zip(segments[start:stop], checked.encode(start, stop), strict=True)
                for digest in (episode_digest(segment.episode_id),)
            ]
            for start in range(0, len(segments), count)
            for stop in (min(start + count, len(segments)),)
        )

    def _arrival(self, segment: Segment, encoded: EncodedSegment) -> bytes:
        """What the commit must know of one segment."""
        at = self._codec.checksum_offset
        return _ARRIVAL.pack(
            segment.segment_index,
            segment.length,
            segment.is_last,
            segment.is_last and segment.success,
            bool(segment.interventions[: segment.length].any()),
            segment.policy_version,
            encoded.segment_return,
            bytes(encoded.row[at : at + 8]),
        )

    def _store(
        self, items: list[_Item], deadline: Deadline, timeout_s: float, meanwhile: Callable[[], None]
    ) -> DataError | None:
        """Commit all of ``items``; the first one that contradicts its episode comes back as an error.

        ``meanwhile`` is done, perhaps more than once, while a server works.
        """
        refused: DataError | None = None
        staged = False
        while items:
            try:
                upload = [] if staged else self._upload(items, deadline, meanwhile)
                commit = (
                    "FCALL",
                    function_name("commit"),
                    1,
                    self._keys.state,
                    int(deadline.first),
                    self._codec.checksum_offset,
                    *_runs(items),
                )
                commands = [*upload, *self._forget_unlinked(), commit]
                replies = self._link.exchange(commands, timeout_s=deadline.left_s, meanwhile=meanwhile)
                answer = replies[-1]
                if isinstance(answer, ReplyError):
                    raise self._link.meaning(answer)
            except ServerFull as full:
                staged, reason = False, str(full)
            else:
                full = next((reply for reply in replies if isinstance(reply, ReplyError)), None)
                expired = "the payload expired before it was committed"
                staged, reason = False, expired if full is None else str(self._link.meaning(full))
                letters, last_indices, why, images_gone = answer
                answers, last_indices = letters.decode(), iter(last_indices)
                lost = self._settle_images(items, answers, images_gone, deadline)
                for item, letter in zip(items, answers, strict=False):
                    if letter == "c":
                        refused = refused or _contradiction(item.segment, next(last_indices))
                        item.result = "duplicate"
                    elif letter == "w":
                        staged, reason = True, wait_reason("inserts", why)
                        self.on_wait()
                    elif letter != "m":
                        item.inserted |= letter in "oO"
                        if item.digest in lost:
                            reason = "the server of the images forgot them"
                        else:
                            item.result = "inserted" if item.inserted else "duplicate"
                staged = staged and not lost
                items = [item for item in items if item.result is None]
            if items and not deadline.pause():
                first = items[0].segment
                raise ReplayWait(
                    f"{len(items)} segments from {first.episode_id}/{first.segment_index} on were not stored within "
                    f"{timeout_s} s: {reason}. Append them again later."
                )
        return refused

    def close(self) -> None:
        """Say what is left to say; the links are their owner's."""
        left = self._forget_unlinked()
        if left:
            with contextlib.suppress(Unreachable):
                self._link.call(left, timeout_s=0.0)

    def _forget_unlinked(self) -> list[Command]:
        """Takes entries whose images are removed off the list, in a round trip that is made anyway.

        Where that fails they stay on the list, and their images are removed once more.
        """
        if self._images_gone is None:
            return []
        with self._lock:
            unlinked, self._unlinked = self._unlinked, []
        return self._images_gone.forget(unlinked)

    def _upload(self, items: list[_Item], deadline: Deadline, meanwhile: Callable[[], None]) -> list[Command]:
        """Commands that put the payloads on the server of the rows; images of another server are sent at once."""
        commands: list[Command] = []
        for item in items:
            row = self._keys.row(item.digest, item.segment.segment_index)
            # NX: what is committed already stays as it is, whatever a retry brings.
            commands.append((b"SET", row, item.encoded.row, b"NX", b"PX", _STAGE_MS))
            if self._images is None:
                commands += self._image_commands(item, b"NX", b"PX", _IMAGE_STAGE_MS)
        if self._images is not None:
            self._upload_apart(self._images, items, deadline, meanwhile)
        return commands

    def _upload_apart(
        self, images: RedisLink, items: list[_Item], deadline: Deadline, meanwhile: Callable[[], None]
    ) -> None:
        """Frames that are there and still expire are those of an earlier attempt, perhaps of another segment."""
        names = [name for item in items for name in self._image_names(item)]
        commands = [command for item in items for command in self._image_commands(item, b"PX", _APART_STAGE_MS)]
        staging = [(*command, b"NX") for command in commands]
        answers = images.call(staging, timeout_s=deadline.left_s, meanwhile=meanwhile)
        there = [place for place, answer in enumerate(answers) if answer is None]
        if there:
            left_ms = images.call([("PTTL", names[place]) for place in there], timeout_s=deadline.left_s)
            again = [commands[place] for place, left in zip(there, left_ms, strict=True) if left > 0]
            if again:
                images.call(again, timeout_s=deadline.left_s)

    def _image_commands(self, item: _Item, *options: Any) -> list[Command]:
        return [
            ("SET", name, item.encoded.images[camera], *options)
            for camera, name in zip(self._cameras, self._image_names(item), strict=True)
        ]

    def _image_names(self, item: _Item) -> list[str]:
        return [
            self._keys.image(item.digest, item.segment.segment_index, number) for number in range(len(self._cameras))
        ]

    def _settle_images(self, items: list[_Item], answers: str, images_gone: bytes, deadline: Deadline) -> Set[str]:
        """On a server of their own, images outlive their expiry once the row is committed, and leave with it.

        Returns the digests of episodes whose images vanished between upload and commit: they must come again, and be
        committed again, because the episode may have been evicted meanwhile.
        """
        if self._images_gone is None or self._images is None or not self._cameras:
            return frozenset()
        commands: list[Command] = []
        stored: list[tuple[str, str]] = []
        gone = ImagesGone.split(images_gone)
        for item, letter in zip(items, answers, strict=False):
            names = self._image_names(item)
            if letter in "cOD":
                commands.append(("UNLINK", *names))
            elif letter in "od":
                stored += [(item.digest, name) for name in names]
        persist: list[Command] = [("PERSIST", name) for _, name in stored]
        commands = [*persist, *commands, *self._images_gone.unlink(gone)]
        replies = self._images.call(commands, timeout_s=deadline.left_s) if commands else []
        with self._lock:
            self._unlinked += gone
        # Without an expiry before, or not there at all?
        doubtful = [pair for pair, kept in zip(stored, replies, strict=False) if not kept]
        if not doubtful:
            return frozenset()
        present = self._images.call([("EXISTS", name) for _, name in doubtful], timeout_s=deadline.left_s)
        return {digest for (digest, _), there in zip(doubtful, present, strict=True) if not there}


def _nothing() -> None:
    return


def _runs(items: Sequence[_Item]) -> Iterator[bytes]:
    """Packed for the commit: what neighbours of one episode have in common is said once."""

    def common(item: _Item) -> tuple[str, str, str, str]:
        segment = item.segment
        return item.digest, segment.source, segment.task, segment.instruction

    for (digest, source, task, instruction), run in itertools.groupby(items, common):
        arrivals = list(run)
        texts = (arrivals[0].segment.episode_id.encode(), task.encode(), instruction.encode())
        head = _RUN.pack(digest.encode(), SOURCES.index(source), len(arrivals), *map(len, texts))
        yield b"".join((head, *texts, *(item.arrival for item in arrivals)))


def wait_reason(side: str, reply: Sequence[bytes]) -> str:
    """In words, why ``inserts`` or ``samples`` must wait: see ``wait_reply`` in functions.lua."""
    drawable, min_steps, balance, ratio, buffer, stored, capacity, behind = (float(field) for field in reply[3:11])
    if reply[1] == b"archive":
        return (
            f"the buffer is full ({stored:.0f} of {capacity:.0f} steps) and its oldest episode is not archived yet, "
            f"{behind:.0f} are not; is the archiver running?"
        )
    text = (
        f"the limiter makes {side} wait: {drawable:.0f} steps of complete episodes stored, min_steps {min_steps:.0f}; "
        f"{stored:.0f} steps in all, capacity {capacity:.0f}"
    )
    if ratio >= 0:
        text += f"; balance {balance:.1f} windows, error buffer {buffer:.1f}, samples_per_insert {ratio}"
    if drawable < min_steps and stored > 0.9 * capacity:
        text += "; the buffer is full of open episodes, raise capacity_steps"
    return text


def _contradiction(segment: Segment, last_index: int) -> DataError:
    return DataError(
        f"segment {segment.episode_id}/{segment.segment_index} (is_last {segment.is_last}) contradicts index "
        f"{last_index}, the last of its episode so far; give a new episode its own id"
    )
