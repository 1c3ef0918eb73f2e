"""Segments on their way to the spool: packed, hashed and written beside the control loop, not in it.

who            consumes        waits for              unblocked by
put, finish    -               room in the queue      the writer
writer         the queue       a segment, the disk    put, finish
"""

import contextlib
import queue
import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from vla_dist.core.errors import ResourceMissing, VlaDistError, WaitTimeout
from vla_dist.core.types import Segment
from vla_dist.protocol.episode_content import ContentHash
from vla_dist.protocol.fleet_records import EpisodeRecord
from vla_dist.robot.frames import FramePacker
from vla_dist.robot.spool import Spool

_QUEUE = 4
"""Segments between the robot and its disk; more than that and the disk cannot keep up."""


class SpoolWriter:
    """Packs, hashes and spools the segments of one episode in a thread of its own."""

    def __init__(self, spool: Spool, packer: FramePacker | None) -> None:
        self._spool = spool
        self._packer = packer
        self._content = ContentHash()
        self._queue: queue.Queue[tuple[Segment, EpisodeRecord | None] | None] = queue.Queue(_QUEUE)
        self._done = threading.Event()
        self._error: VlaDistError | None = None
        self._written: EpisodeRecord | None = None
        self._thread: threading.Thread | None = None

    def raise_if_failed(self) -> None:
        """Raise what the disk refused."""
        if self._error is not None:
            raise self._error

    def put(self, segment: Segment, record: EpisodeRecord | None, *, timeout_s: float) -> None:
        """Hand a segment over. Raises WaitTimeout where the disk is that far behind."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._write, name="spool-writer", daemon=True)
            self._thread.start()
        try:
            self._queue.put((segment, record), timeout=timeout_s)
        except queue.Full as error:
            raise WaitTimeout(
                f"the disk of the spool in {self._spool.folder} did not take a segment for {timeout_s} s; is it "
                "healthy, and fast enough for these cameras?"
            ) from error

    def finish(self, last: Segment, record: EpisodeRecord, *, timeout_s: float) -> EpisodeRecord:
        """Write the last segment; the record with its hashes, once all is on the disk. Raises what the disk refused."""
        if self._error is not None:
            self._close_what_is_there(record)
            raise self._error
        self.put(last, record, timeout_s=timeout_s)
        if not self._done.wait(timeout_s):
            raise WaitTimeout(f"the disk of the spool in {self._spool.folder} was not done within {timeout_s} s")
        if self._written is None:
            self._close_what_is_there(record)
            raise self._error or ResourceMissing(f"episode {record.episode_id} could not be written")
        return self._written

    def stop(self, *, timeout_s: float) -> None:
        """Of an episode without steps."""
        if self._thread is not None:
            self._queue.put(None, timeout=timeout_s)
            self._thread.join(timeout_s)

    def _close_what_is_there(self, record: EpisodeRecord) -> None:
        # On a full disk this fails as well; then the spool does it when it is opened the next time.
        with contextlib.suppress(ResourceMissing):
            steps = self._spool.steps_of(record.episode_id)
            interventions = tuple(one for one in record.interventions if one.end_step <= steps)
            shortened = replace(
                record,
                num_steps=steps,
                success=False,
                partial=record.partial or str(self._error),
                interventions=interventions,
                content_sha256=self._content.content_sha256,
                frames_sha256=self._content.frames_sha256,
            )
            self._spool.close_partial(shortened)

    def _write(self) -> None:
        try:
            while (item := self._queue.get()) is not None:
                segment, record = item
                written = self._spool_one(segment, record)
                if record is not None:
                    self._written = written
                    return
        except VlaDistError as error:
            self._error = error
            # Whoever waits for room must learn of it, not wait.
            with contextlib.suppress(queue.Empty):
                while True:
                    self._queue.get_nowait()
        finally:
            self._done.set()

    def _spool_one(self, segment: Segment, record: EpisodeRecord | None) -> EpisodeRecord | None:
        packed = None if self._packer is None else self._packer.pack(segment)
        content = self._content.copy()
        content.add(segment)
        for camera, frames in (packed or {}).items():
            content.add_frames(camera, frames.frames)
        if packed is None:
            for camera, images in segment.images.items():
                content.add_frames(camera, [np.ascontiguousarray(images[: segment.length]).reshape(-1).data])
        if record is not None:
            record = replace(record, content_sha256=content.content_sha256, frames_sha256=content.frames_sha256)
        self._spool.put(segment, packed=packed, record=record)
        # Only what is on the disk counts.
        self._content = content
        return record


def spool_sink(spool: Spool) -> Callable[[Segment], None]:
    """What takes the segments of a ControlLoop: each episode closes itself with its last segment."""
    content: dict[str, ContentHash] = {}
    steps: dict[str, int] = {}

    def take(segment: Segment) -> None:
        name = segment.episode_id
        content.setdefault(name, ContentHash()).add(segment)
        for camera, images in segment.images.items():
            content[name].add_frames(camera, [np.ascontiguousarray(images[: segment.length]).reshape(-1).data])
        steps[name] = steps.get(name, 0) + segment.length
        record = None
        if segment.is_last:
            hashed = content.pop(name)
            record = EpisodeRecord(
                episode_id=name,
                robot_id=segment.robot_id,
                task=segment.task,
                source=segment.source,
                num_steps=steps.pop(name),
                num_segments=segment.segment_index + 1,
                success=segment.success,
                content_sha256=hashed.content_sha256,
                frames_sha256=hashed.frames_sha256,
            )
        spool.put(segment, record=record)

    return take
