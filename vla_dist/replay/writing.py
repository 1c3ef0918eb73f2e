"""Appending segments: payloads first, under an expiry, then one commit for all of them.

consumes: segments. waits for: the limiters, room, the archive. unblocked by: samples, evictions, the archiver.
"""

import contextlib
import struct
import threading
from collections.abc import Callable, Mapping, Sequence, Set
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
_MOST_SEGMENTS = 64
_MOST_BYTES = 16 << 20
MOST_SEGMENTS_PER_EPISODE = 1 << 16
# See ARRIVAL in functions.lua.
_ARRIVAL = struct.Struct("<16sIIBBBBdd8sHH")


@dataclass(slots=True)
class _Item:
    segment: Segment
    encoded: EncodedSegment
    digest: str
    arrival: bytes
    num_bytes: int
    result: AppendResult | None = None
    inserted: bool = False
    """By this call, even if its images had to be brought again."""


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
        items = self._prepare(segments, frames)
        deadline = Deadline(timeout_s)
        refused: DataError | None = None
        start = 0
        while start < len(items):
            stop, size = start + 1, items[start].num_bytes
            while stop < min(len(items), start + _MOST_SEGMENTS) and size + items[stop].num_bytes <= _MOST_BYTES:
                size += items[stop].num_bytes
                stop += 1
            refused = self._store(items[start:stop], deadline, timeout_s) or refused
            start = stop
        if refused is not None:
            raise refused
        return [item.result for item in items if item.result is not None]

    def _prepare(
        self, segments: Sequence[Segment], frames: Sequence[Mapping[str, bytes | memoryview]] | None
    ) -> list[_Item]:
        for segment in segments:
            if segment.segment_index >= MOST_SEGMENTS_PER_EPISODE:
                raise DataError(
                    f"segment_index {segment.segment_index} must be below {MOST_SEGMENTS_PER_EPISODE}; end the "
                    "episode earlier"
                )
        return [
            _Item(segment, encoded, digest, self._arrival(segment, encoded, digest), _num_bytes(encoded))
            for segment, encoded in zip(segments, self._codec.encode_all(segments, frames), strict=True)
            for digest in (episode_digest(segment.episode_id),)
        ]

    def _arrival(self, segment: Segment, encoded: EncodedSegment, digest: str) -> bytes:
        """What the commit must know."""
        episode_id, task = segment.episode_id.encode(), segment.task.encode()
        at = self._codec.checksum_offset
        packed = _ARRIVAL.pack(
            digest.encode(),
            segment.segment_index,
            segment.length,
            segment.is_last,
            segment.is_last and segment.success,
            SOURCES.index(segment.source),
            bool(segment.interventions[: segment.length].any()),
            segment.policy_version,
            encoded.segment_return,
            bytes(encoded.row[at : at + 8]),
            len(episode_id),
            len(task),
        )
        return b"".join((packed, episode_id, task, segment.instruction.encode()))

    def _store(self, items: list[_Item], deadline: Deadline, timeout_s: float) -> DataError | None:
        """Commit all of ``items``; the first one that contradicts its episode comes back as an error."""
        refused: DataError | None = None
        staged = False
        while items:
            try:
                upload = [] if staged else self._upload(items, deadline)
                commit = (
                    "FCALL",
                    function_name("commit"),
                    1,
                    self._keys.state,
                    int(deadline.first),
                    self._codec.checksum_offset,
                    *(item.arrival for item in items),
                )
                replies = self._link.exchange([*upload, *self._forget_unlinked(), commit], timeout_s=deadline.left_s)
                answer = replies[-1]
                if isinstance(answer, ReplyError):
                    raise self._link.meaning(answer)
            except ServerFull as full:
                staged, reason = False, str(full)
            else:
                full = next((reply for reply in replies if isinstance(reply, ReplyError)), None)
                expired = "the payload expired before it was committed"
                staged, reason = False, expired if full is None else str(self._link.meaning(full))
                answers, images_gone = answer
                lost = self._settle_images(items, answers, images_gone, deadline)
                for item, reply in zip(items, answers, strict=False):
                    kind = reply[0]
                    if kind == b"CLOSED":
                        refused = refused or _contradiction(item.segment, int(reply[1]))
                        item.result = "duplicate"
                    elif kind == b"WAIT":
                        staged, reason = True, wait_reason("inserts", reply)
                        self.on_wait()
                    elif kind != b"MISSING":
                        item.inserted |= kind == b"OK"
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

    def _upload(self, items: list[_Item], deadline: Deadline) -> list[Command]:
        """Commands that put the payloads on the server of the rows; images of another server are sent at once."""
        commands: list[Command] = []
        for item in items:
            row = self._keys.row(item.digest, item.segment.segment_index)
            # NX: what is committed already stays as it is, whatever a retry brings.
            commands.append((b"SET", row, item.encoded.row, b"NX", b"PX", _STAGE_MS))
            if self._images is None:
                commands += self._image_commands(item, b"NX", b"PX", _IMAGE_STAGE_MS)
        if self._images is not None:
            self._upload_apart(self._images, items, deadline)
        return commands

    def _upload_apart(self, images: RedisLink, items: list[_Item], deadline: Deadline) -> None:
        """Frames that are there and still expire are those of an earlier attempt, perhaps of another segment."""
        names = [name for item in items for name in self._image_names(item)]
        commands = [command for item in items for command in self._image_commands(item, b"PX", _APART_STAGE_MS)]
        answers = images.call([(*command, b"NX") for command in commands], timeout_s=deadline.left_s)
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

    def _settle_images(
        self, items: list[_Item], answers: list[Any], images_gone: bytes, deadline: Deadline
    ) -> Set[str]:
        """On a server of their own, images outlive their expiry once the row is committed, and leave with it.

        Returns the digests of episodes whose images vanished between upload and commit: they must come again, and be
        committed again, because the episode may have been evicted meanwhile.
        """
        if self._images_gone is None or self._images is None or not self._cameras:
            return frozenset()
        commands: list[Command] = []
        stored: list[tuple[str, str]] = []
        gone = ImagesGone.split(images_gone)
        for item, reply in zip(items, answers, strict=False):
            names = self._image_names(item)
            if reply[0] == b"CLOSED" or (reply[0] in (b"OK", b"DUP") and reply[1] == b"1"):
                commands.append(("UNLINK", *names))
            elif reply[0] in (b"OK", b"DUP"):
                stored += [(item.digest, name) for name in names]
        persist: list[Command] = [("PERSIST", name) for _, name in stored]
        commands = [*persist, *commands, *self._images_gone.unlink(gone)]
        answers = self._images.call(commands, timeout_s=deadline.left_s) if commands else []
        with self._lock:
            self._unlinked += gone
        # Without an expiry before, or not there at all?
        doubtful = [pair for pair, kept in zip(stored, answers, strict=False) if not kept]
        if not doubtful:
            return frozenset()
        present = self._images.call([("EXISTS", name) for _, name in doubtful], timeout_s=deadline.left_s)
        return {digest for (digest, _), there in zip(doubtful, present, strict=True) if not there}


def _nothing() -> None:
    return


def _num_bytes(encoded: EncodedSegment) -> int:
    return len(encoded.row) + sum(memoryview(data).nbytes for data in encoded.images.values())


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
