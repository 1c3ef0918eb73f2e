"""Camera frames as they lie in the spool and travel: JPEG by config, raw without the encoder."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vla_dist.core.errors import ConfigError, ResourceMissing
from vla_dist.core.types import Array, Segment
from vla_dist.protocol.conversion import encode_segment
from vla_dist.protocol.v1 import fleet_pb2

PackedImages = Mapping[str, fleet_pb2.PackedFrames]
"""Camera name to its packed frames."""


class FramePacker:
    """Packs the frames of segments as JPEG.

    Raises:
        ConfigError: a quality that JPEG has not.
        ResourceMissing: the encoder is not installed.
    """

    def __init__(self, *, quality: int = 90) -> None:
        if not 1 <= quality <= 100:
            raise ConfigError(f"JPEG quality {quality} must be within 1..100")
        self.encoding = f"jpeg:{quality}"
        self._quality = quality
        self._jpeg = _load_jpeg()

    def pack(self, segment: Segment) -> dict[str, fleet_pb2.PackedFrames]:
        """The valid frames of each camera."""
        return {
            name: fleet_pb2.PackedFrames(encoding=self.encoding, frames=self._encode(frames[: segment.length]))
            for name, frames in segment.images.items()
        }

    def _encode(self, frames: Array | Sequence[Array]) -> list[bytes]:
        # As the replay's own JPEG: small frames lose coloured details to chroma subsampling.
        return [self._jpeg.encode_jpeg(frame, quality=self._quality, colorsubsampling="444") for frame in frames]


def upload_request(segment: Segment, packed: PackedImages | None) -> bytes:
    """A serialised ``UploadRequest``; ``packed`` goes instead of the segment's images."""
    if packed is None:
        return fleet_pb2.UploadRequest(segment=encode_segment(segment)).SerializeToString()
    bare = encode_segment(replace(segment, images={}))
    return fleet_pb2.UploadRequest(segment=bare, packed_images=packed).SerializeToString()


def _load_jpeg() -> Any:
    try:
        import simplejpeg
    except ModuleNotFoundError as error:
        raise ResourceMissing(
            "JPEG for cameras needs simplejpeg: pip install 'vla-dist[camera]', or record raw frames"
        ) from error
    return simplejpeg
