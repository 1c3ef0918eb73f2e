"""Frames as robots send them: every one decoded once before it is believed, and stored as it came where that fits.

Dimensions: T segment steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import simplejpeg

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.core.specs import CameraSpec, EnvSpec
from vla_dist.core.types import Array
from vla_dist.data.image_codec import ImageCodec, ImageEncoding
from vla_dist.protocol.v1 import fleet_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceivedFrames:
    """The frames of one segment."""

    images: Mapping[str, Array]
    """camera name -> (T, H, W, 3) uint8, padded with zeros."""
    packed: Mapping[str, bytes]
    """camera name -> the valid frames as an ``ImageCodec`` for JPEG packs them."""


def unpack_frames(
    messages: Mapping[str, fleet_pb2.PackedFrames], spec: EnvSpec, *, length: int, num_steps: int
) -> ReceivedFrames:
    """Decode the JPEG frames of all cameras of a spec.

    Raises:
        DataError: other cameras than the spec's, another number or size of frames, or bytes that are no JPEG.
    """
    expected = {camera.name for camera in spec.cameras}
    if set(messages) != expected:
        raise DataError(f"packed frames of cameras {sorted(messages)}, the spec has {sorted(expected)}")
    images, packed = {}, {}
    for camera in spec.cameras:
        message = messages[camera.name]
        codec = ImageCodec(camera, _encoding(camera.name, message.encoding))
        if len(message.frames) != length:
            raise DataError(f"camera {camera.name!r} has {len(message.frames)} frames, the segment {length} steps")
        for number, frame in enumerate(message.frames):
            _require_size(camera, number, frame)
        ends = np.cumsum([len(frame) for frame in message.frames], dtype="<u4")
        data = b"".join([ends.tobytes(), *message.frames])
        padded = np.zeros((num_steps, *codec.frame_shape), np.uint8)
        padded[:length] = codec.unpack(data, length)
        images[camera.name], packed[camera.name] = padded, data
    return ReceivedFrames(images=images, packed=packed)


def _encoding(camera: str, text: str) -> ImageEncoding:
    try:
        encoding = ImageEncoding.parse(text[:32])
    except ConfigError as error:
        raise DataError(f"camera {camera!r}: {error}") from error
    if encoding.kind != "jpeg":
        raise DataError(f"camera {camera!r} comes as {text[:32]!r}, packed frames are jpeg:QUALITY")
    return encoding


def _require_size(camera: CameraSpec, number: int, frame: bytes) -> None:
    """By the header alone: a small file may claim to be a huge picture."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(frame)
    except ValueError as error:
        raise DataError(f"camera {camera.name!r}, frame {number} is no JPEG ({error})") from error
    if (height, width) != (camera.height, camera.width):
        raise DataError(
            f"camera {camera.name!r}, frame {number} is {height} x {width}, the spec says "
            f"{camera.height} x {camera.width}"
        )
