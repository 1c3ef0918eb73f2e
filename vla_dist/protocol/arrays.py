"""Arrays on the wire: data type, shape and bytes, all three compared with the expected before anything is decoded."""

from collections.abc import Sequence

import numpy as np

from vla_dist.core.errors import DataError
from vla_dist.core.types import Array
from vla_dist.protocol.v1 import types_pb2

_WIRE_TYPES: dict[np.dtype[np.generic], types_pb2.DataType] = {
    np.dtype("<f4"): types_pb2.DATA_TYPE_FLOAT32,
    np.dtype("u1"): types_pb2.DATA_TYPE_UINT8,
    np.dtype("?"): types_pb2.DATA_TYPE_BOOL,
}
_NUMPY_TYPES = {wire: dtype for dtype, wire in _WIRE_TYPES.items()}


def encode_array(array: Array, *, label: str) -> types_pb2.Array:
    """Any array of float32, uint8 or bool. Raises DataError for other types."""
    wire_type = _WIRE_TYPES.get(array.dtype.newbyteorder("<"))
    if wire_type is None:
        allowed = ", ".join(str(dtype) for dtype in _WIRE_TYPES)
        raise DataError(f"{label} is {array.dtype}, expected one of {allowed}; convert it before sending")
    data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    return types_pb2.Array(data_type=wire_type, shape=array.shape, data=data)


def decode_array(
    message: types_pb2.Array,
    *,
    label: str,
    dtype: type[np.generic],
    shape: Sequence[int],
    finite: bool = False,
) -> Array:
    """A writable copy of exactly this type and shape.

    Raises:
        DataError: another type, shape or number of bytes; with ``finite``, a NaN or an infinity.
    """
    expected = np.dtype(dtype).newbyteorder("<")
    got = _NUMPY_TYPES.get(message.data_type)
    if got != expected:
        raise DataError(f"{label} has data type {got or 'unspecified'}, expected {expected}")
    if tuple(message.shape) != tuple(shape):
        raise DataError(f"{label} has shape {_shown(message.shape)}, expected {_shown(shape)}")
    num_bytes = int(np.prod(shape, dtype=np.int64)) * expected.itemsize
    if len(message.data) != num_bytes:
        raise DataError(f"{label} has {len(message.data)} bytes, expected {num_bytes} for shape {_shown(shape)}")
    if expected == np.bool_ and message.data.strip(b"\0\1"):
        raise DataError(f"{label} holds bytes other than 0 and 1, expected booleans")
    array = np.frombuffer(message.data, expected).reshape(shape).astype(dtype)
    if finite and not np.isfinite(array).all():
        raise DataError(f"{label} holds a value that is not finite, expected numbers only; check the sensor")
    return array


def _shown(shape: Sequence[int]) -> str:
    shown = ", ".join(str(size) for size in shape[:6])
    return f"({shown}, ... {len(shape)} axes)" if len(shape) > 6 else f"({shown})"
