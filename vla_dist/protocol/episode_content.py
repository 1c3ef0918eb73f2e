"""A hash of what an episode holds, the same on the robot that recorded it and in the archive that keeps it."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from vla_dist.core.types import Segment

_COLUMNS = ("proprio", "actions", "target_actions", "rewards", "interventions")


class ContentHash:
    """SHA-256 over the valid steps of an episode's segments, added in their order.

    Numbers are hashed as little-endian float32 and bool, each column of each segment after its name and shape, so that
    nothing can move from one column to the next unseen.
    """

    def __init__(self) -> None:
        self._numbers = hashlib.sha256()
        self._frames = hashlib.sha256()
        self._has_frames = False

    def add(self, segment: Segment) -> None:
        """The numbers of one segment."""
        length = segment.length
        self._numbers.update(
            f"{segment.episode_id}/{segment.segment_index}/{length}/{segment.task}/{segment.instruction}".encode()
        )
        for name in _COLUMNS:
            column: np.ndarray[Any, Any] = getattr(segment, name)[:length]
            kind = "?" if name == "interventions" else "<f4"
            self._numbers.update(f"{name}{column.shape}".encode())
            self._numbers.update(np.ascontiguousarray(column, kind).tobytes())

    def add_frames(self, camera: str, frames: Sequence[bytes | memoryview]) -> None:
        """The frames of one camera and segment, packed as they travel."""
        self._has_frames = True
        self._frames.update(f"{camera}/{sum(len(frame) for frame in frames)}".encode())
        for frame in frames:
            self._frames.update(frame)

    def copy(self) -> "ContentHash":
        """One that goes on from here by itself."""
        other = ContentHash()
        other._numbers, other._frames = self._numbers.copy(), self._frames.copy()
        other._has_frames = self._has_frames
        return other

    @property
    def content_sha256(self) -> str:
        return self._numbers.hexdigest()

    @property
    def frames_sha256(self) -> str:
        """Empty where no frame was added."""
        return self._frames.hexdigest() if self._has_frames else ""


def content_sha256(segments: Iterable[Segment]) -> str:
    """Of the numbers of a whole episode, its segments in order."""
    content = ContentHash()
    for segment in segments:
        content.add(segment)
    return content.content_sha256
