"""Frames to MP4 and back through PyAV, each at an exact time of the file.

Dimensions: L frames.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import av
import numpy as np
from av.error import FFmpegError

from vla_dist.core.errors import ConfigError, DataError, IntegrityError
from vla_dist.core.types import Array

Codec = Literal["libx264", "libsvtav1"]
_MAX_DENOMINATOR = 1001


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoEncoding:
    """How frames are compressed."""

    codec: Codec = "libx264"
    """``libsvtav1`` is several times slower and several times smaller; LeRobot's own default."""
    crf: int = 18
    """Constant rate factor: lower is better and larger."""
    group: int = 2
    """Frames between two that stand by themselves: few make single frames quick to reach."""

    def __post_init__(self) -> None:
        if self.codec not in ("libx264", "libsvtav1"):
            raise ConfigError(f"video codec {self.codec!r} must be libx264 or libsvtav1")
        if not 0 <= self.crf <= 63 or self.group < 1:
            raise ConfigError(f"crf {self.crf} must be within 0..63 and group {self.group} at least 1")


class VideoWriter:
    """One file to which the frames of one camera are added; use it in a ``with`` block."""

    def __init__(self, path: Path, *, fps: float, height: int, width: int, encoding: VideoEncoding) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.num_frames = 0
        self._num_bytes = 0
        self._shape = (height, width, 3)
        self._container: Any = av.open(str(path), "w")
        rate = Fraction(fps).limit_denominator(_MAX_DENOMINATOR)
        self._stream: Any = self._container.add_stream(
            encoding.codec, rate, options={"g": str(encoding.group), "crf": str(encoding.crf)}
        )
        self._stream.height, self._stream.width = height, width
        # Chroma at half size needs even sides; the encoder of AV1 knows no other.
        is_odd = height % 2 or width % 2
        if is_odd and encoding.codec == "libsvtav1":
            raise ConfigError(f"{width} x {height} has an odd side, which libsvtav1 cannot encode; use libx264")
        self._stream.pix_fmt = "yuv444p" if is_odd else "yuv420p"

    @property
    def num_bytes(self) -> int:
        """Encoded so far; the encoder holds back the newest frames."""
        return self._num_bytes

    def add(self, frames: Array) -> None:
        """(L, H, W, 3) uint8."""
        for image in frames:
            if image.shape != self._shape or image.dtype != np.uint8:
                raise DataError(f"{image.dtype} frame of shape {image.shape}, expected uint8 of {self._shape}")
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            for packet in self._stream.encode(frame):
                self._num_bytes += packet.size
                self._container.mux(packet)
        self.num_frames += len(frames)

    def close(self) -> None:
        for packet in self._stream.encode():
            self._container.mux(packet)
        self._container.close()

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_frames(path: Path, *, first_s: float, count: int, fps: float) -> Array:
    """(L, H, W, 3) uint8: ``count`` frames from the one shown at ``first_s``.

    Raises:
        IntegrityError: no such video, or one that ends before.
    """
    frames = []
    tolerance_s = 0.4 / fps
    try:
        for time_s, frame in _decoded(path, first_s):
            if time_s < first_s - tolerance_s:
                continue
            frames.append(frame)
            if len(frames) == count:
                break
    except (OSError, FFmpegError) as error:
        raise IntegrityError(f"{path} is no video that can be read ({error})") from error
    if len(frames) < count:
        raise IntegrityError(f"{path} has {len(frames)} frames from {first_s:.3f} s on, expected {count}")
    return np.stack(frames)


def _decoded(path: Path, first_s: float) -> Iterator[tuple[float, Array]]:
    with av.open(str(path)) as container:
        stream: Any = container.streams.video[0]
        container.seek(int(first_s / stream.time_base), stream=stream, backward=True)
        for frame in container.decode(stream):
            yield float(frame.pts * stream.time_base), frame.to_ndarray(format="rgb24")
