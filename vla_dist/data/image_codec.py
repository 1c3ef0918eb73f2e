"""Frames of one camera to bytes and back: raw, LZ4 or JPEG, by config.

Raw frames have one fixed stride, so a window of them can be fetched without the rest. Compressed frames are preceded by
the table of their ends. LZ4 makes clean simulator frames about ten times smaller and sensor noise not at all; JPEG
loses what the eye does not see and is for real cameras.

Dimensions: L frames.
"""

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import simplejpeg

from vla_dist.core.errors import ConfigError, DataError, IntegrityError
from vla_dist.core.specs import CameraSpec
from vla_dist.core.types import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageEncoding:
    """How the frames of a camera are stored."""

    kind: Literal["raw", "lz4", "jpeg"] = "raw"
    quality: int = 90
    """Of JPEG, 1..100."""

    def __post_init__(self) -> None:
        if self.kind not in ("raw", "lz4", "jpeg"):
            raise ConfigError(f"image encoding {self.kind!r} must be raw, lz4 or jpeg")
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"JPEG quality {self.quality} must be within 1..100")

    def __str__(self) -> str:
        return f"jpeg:{self.quality}" if self.kind == "jpeg" else self.kind

    @classmethod
    def parse(cls, text: str) -> "ImageEncoding":
        """``raw``, ``lz4``, ``jpeg`` or ``jpeg:QUALITY``. Raises ConfigError."""
        match = re.fullmatch(r"(raw|lz4)|jpeg(?::(\d{1,3}))?", text)
        if not match:
            raise ConfigError(f"image encoding {text!r} must be raw, lz4, jpeg or jpeg:QUALITY, for example jpeg:90")
        if match[1]:
            return cls(kind="raw" if match[1] == "raw" else "lz4")
        return cls(kind="jpeg", quality=int(match[2] or 90))


RAW = ImageEncoding()


class ImageCodec:
    """Packs and unpacks the frames of one camera."""

    def __init__(self, camera: CameraSpec, encoding: ImageEncoding) -> None:
        self.camera = camera
        self.encoding = encoding
        self.frame_shape = (camera.height, camera.width, 3)
        self.frame_bytes = camera.height * camera.width * 3
        self._lz4 = pa.Codec("lz4_raw") if encoding.kind == "lz4" else None

    @property
    def is_raw(self) -> bool:
        """Whether frame i lies at i * ``frame_bytes``."""
        return self.encoding.kind == "raw"

    def pack(self, frames: Array) -> bytes | memoryview:
        """(L, H, W, 3) uint8 to bytes; raw frames that lie in one piece are not copied.

        Raises:
            DataError: another shape or dtype.
        """
        if frames.dtype != np.uint8 or frames.shape[1:] != self.frame_shape:
            raise DataError(
                f"camera {self.camera.name!r} has {frames.dtype} frames of shape {frames.shape}, expected uint8 of "
                f"(L, {', '.join(map(str, self.frame_shape))})"
            )
        frames = np.ascontiguousarray(frames)
        if self.is_raw:
            return frames.reshape(-1).data
        packed = [self._compress(frame) for frame in frames]
        ends = np.cumsum([len(data) for data in packed], dtype="<u4")
        return b"".join([ends.tobytes(), *packed])

    def unpack(self, data: bytes | memoryview, num_frames: int, first: int = 0, count: int | None = None) -> Array:
        """Frames ``first`` to ``first + count`` of the L = ``num_frames`` that were packed: (count, H, W, 3) uint8.

        Args:
            count: None: up to the last one.

        Raises:
            IntegrityError: bytes that ``pack`` never made for that many frames of this camera.
        """
        count = num_frames - first if count is None else count
        if self.is_raw:
            if len(data) != num_frames * self.frame_bytes:
                raise self._damaged(f"{len(data)} bytes, expected {num_frames} frames of {self.frame_bytes}")
            return np.frombuffer(data, np.uint8).reshape(num_frames, *self.frame_shape)[first : first + count]
        if len(data) < 4 * num_frames:
            raise self._damaged(f"{len(data)} bytes, expected the table of {num_frames} frames")
        ends = np.frombuffer(data, "<u4", num_frames).astype(np.int64)
        body = memoryview(data)[4 * num_frames :]
        if len(body) != (ends[-1] if num_frames else 0) or (np.diff(ends, prepend=0) < 0).any():
            raise self._damaged(f"{len(body)} bytes of {self.encoding.kind}, which its table of frames contradicts")
        frames = np.empty((count, *self.frame_shape), np.uint8)
        for number in range(count):
            start = int(ends[first + number - 1]) if first + number else 0
            frames[number] = self._decompress(body[start : int(ends[first + number])])
        return frames

    def _compress(self, frame: Array) -> bytes:
        if self._lz4 is not None:
            return self._lz4.compress(frame, asbytes=True)
        # No chroma subsampling: small frames lose coloured details to it.
        return simplejpeg.encode_jpeg(frame, quality=self.encoding.quality, colorsubsampling="444")

    def _decompress(self, data: memoryview) -> Array:
        try:
            if self._lz4 is not None:
                pixels = np.frombuffer(self._lz4.decompress(data, self.frame_bytes), np.uint8)
                return pixels.reshape(self.frame_shape)
            frame = simplejpeg.decode_jpeg(data)
        except (ValueError, OSError) as error:
            raise self._damaged(f"a frame that is not {self.encoding.kind} ({error})") from error
        if frame.shape != self.frame_shape:
            raise self._damaged(f"a frame of shape {frame.shape}, expected {self.frame_shape}")
        return frame

    def _damaged(self, got: str) -> IntegrityError:
        return IntegrityError(
            f"camera {self.camera.name!r} has {got}; fetch the images of the row's own segment, or append it again"
        )
