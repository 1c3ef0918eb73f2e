"""Segments to bytes and back: one Arrow record batch of one row, always with the same layout.

For a fixed schema without nulls and variable lengths, Arrow writes the same header and the same buffer offsets every
time. So encoding is a copy of a template and a few assignments, and a whole array of rows is decoded as strided NumPy
views after one comparison with the header, which doubles as the check that the bytes belong to this spec.

Dimensions: N rows, T segment steps, P proprio, A action.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from vla_dist.core.errors import ConfigError, DataError, IntegrityError
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import SOURCES, Array, Segment

_TEXT_BYTES = {"episode_id": 64, "robot_id": 64, "task": 64, "instruction": 256}
_LAYOUT_VERSION = "1"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncodedSegment:
    """A segment as it is stored."""

    row: bytes
    """A valid Arrow record batch message of ``SegmentCodec.row_bytes`` bytes; everything but the images."""
    images: Mapping[str, bytes] = field(default_factory=dict)
    """camera name -> the ``length`` valid frames, raw, one fixed stride after the other."""


class SegmentCodec:
    """Encodes and decodes the segments of one spec and one T.

    Steps after ``Segment.length`` are padding: they are stored as zeros (frames not at all) whatever they held.
    """

    def __init__(self, spec: EnvSpec, num_steps: int) -> None:
        """
        Args:
            spec: gives P, A and the cameras.
            num_steps: T, rows of every segment.
        """
        if num_steps < 1:
            raise ConfigError(f"num_steps {num_steps} must be at least 1")
        self.spec = spec
        self.num_steps = num_steps
        self.frame_bytes = {c.name: c.height * c.width * 3 for c in spec.cameras}
        self.schema = _schema(spec, num_steps)
        self._template, self.row_dtype, header_bytes = _constant_layout(self.schema, spec, num_steps)
        self._header = self._template[:header_bytes]
        self.schema_id = hashlib.sha256(self.schema.serialize().to_pybytes() + self._header.tobytes()).hexdigest()[:16]

    @property
    def row_bytes(self) -> int:
        return len(self._template)

    def encode(self, segment: Segment) -> EncodedSegment:
        """Raises DataError where the segment does not fit the spec or holds a number that is not finite."""
        self._require_shapes(segment)
        row = self._template.copy()
        record = row.view(self.row_dtype)[0]
        for name, capacity in _TEXT_BYTES.items():
            record[name] = _text_bytes(name, getattr(segment, name), capacity)
        record["segment_index"] = segment.segment_index
        record["policy_version"] = segment.policy_version
        record["length"] = segment.length
        record["source"] = SOURCES.index(segment.source)
        record["is_last"] = segment.is_last
        record["success"] = segment.success
        valid = segment.length
        with np.errstate(over="ignore"):  # What float32 cannot hold becomes infinite and is refused below.
            for name in ("proprio", "actions", "target_actions", "rewards", "interventions"):
                record[name][:valid] = getattr(segment, name)[:valid]
        for name in ("proprio", "actions", "target_actions", "rewards"):
            if not np.isfinite(record[name]).all():
                raise DataError(
                    f"segment {segment.episode_id}/{segment.segment_index}: {name} holds NaN or infinity within its "
                    f"{valid} valid steps; every number must be finite. Fix the sensor or end the episode before it."
                )
        images = {name: np.ascontiguousarray(segment.images[name][:valid]).tobytes() for name in self.frame_bytes}
        return EncodedSegment(row=row.tobytes(), images=images)

    def decode(self, row: bytes, images: Mapping[str, bytes] | None = None) -> Segment:
        """Inverse of ``encode``; arrays are read-only views of ``row``, the images are copies.

        Raises:
            IntegrityError: wrong size, header, or a field that no encoder writes.
        """
        record = self.decode_rows([row])[0]
        length = int(record["length"])
        source = int(record["source"])
        if not 1 <= length <= self.num_steps or source >= len(SOURCES):
            raise IntegrityError(
                f"row with length {length} and source {source}, expected a length within 1..{self.num_steps} and a "
                f"source below {len(SOURCES)}; the bytes were damaged, append the segment again"
            )
        try:
            texts = {name: record[name].decode() for name in _TEXT_BYTES}
        except UnicodeDecodeError as error:
            raise IntegrityError(f"row with text that is not UTF-8 ({error}); append the segment again") from error
        frames = self._decode_images(images or {}, length)
        try:
            return Segment(
                **texts,
                segment_index=int(record["segment_index"]),
                policy_version=int(record["policy_version"]),
                source=SOURCES[source],
                is_last=bool(record["is_last"]),
                success=bool(record["success"]),
                length=length,
                proprio=record["proprio"],
                actions=record["actions"],
                target_actions=record["target_actions"],
                rewards=record["rewards"],
                interventions=record["interventions"].view(bool),
                images=frames,
            )
        except DataError as error:
            raise IntegrityError(f"row that no encoder writes ({error}); append the segment again") from error

    def decode_rows(self, rows: Sequence[bytes]) -> Array:
        """Structured (N,) view of one joined copy of ``rows``; fields named as in ``row_dtype``.

        Shapes: ``proprio`` (N, T, P), ``actions`` and ``target_actions`` (N, T, A), ``rewards`` and
        ``interventions`` (N, T), the rest (N,). ``source`` indexes ``core.types.SOURCES``.

        Raises:
            IntegrityError: a row of another size, or with another header.
        """
        for row in rows:
            if len(row) != self.row_bytes:
                raise IntegrityError(
                    f"row of {len(row)} bytes, expected {self.row_bytes} for spec {self.spec.name!r} with T = "
                    f"{self.num_steps}; read it with the codec of the spec it was written for"
                )
        joined = np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), self.row_bytes)
        wrong = np.flatnonzero((joined[:, : len(self._header)] != self._header).any(axis=1))
        if len(wrong):
            raise IntegrityError(
                f"row {wrong[0]} of {len(rows)} has another Arrow header than schema {self.schema_id} (spec "
                f"{self.spec.name!r}, T = {self.num_steps}); it was written for another spec or damaged"
            )
        return joined.reshape(-1).view(self.row_dtype)

    def _require_shapes(self, segment: Segment) -> None:
        expected = {
            "proprio": (self.num_steps, self.spec.proprio_dim),
            "actions": (self.num_steps, self.spec.action_dim),
            "target_actions": (self.num_steps, self.spec.action_dim),
            "rewards": (self.num_steps,),
            "interventions": (self.num_steps,),
        }
        for name, shape in expected.items():
            if getattr(segment, name).shape != shape:
                raise DataError(
                    f"segment {segment.episode_id}/{segment.segment_index}: {name} has shape "
                    f"{getattr(segment, name).shape}, spec {self.spec.name!r} with T = {self.num_steps} expects {shape}"
                )
        if set(segment.images) != set(self.frame_bytes):
            raise DataError(
                f"segment {segment.episode_id}/{segment.segment_index} has cameras {sorted(segment.images)}, spec "
                f"{self.spec.name!r} expects {sorted(self.frame_bytes)}; send every camera of the spec and no other"
            )
        for camera in self.spec.cameras:
            frames = segment.images[camera.name]
            shape = (self.num_steps, camera.height, camera.width, 3)
            if frames.shape != shape or frames.dtype != np.uint8:
                raise DataError(
                    f"segment {segment.episode_id}/{segment.segment_index}: camera {camera.name!r} has "
                    f"{frames.dtype} frames of shape {frames.shape}, expected uint8 of {shape}"
                )

    def _decode_images(self, images: Mapping[str, bytes], length: int) -> dict[str, Array]:
        decoded = {}
        for camera in self.spec.cameras:
            data = images.get(camera.name, b"")
            if len(data) != length * self.frame_bytes[camera.name]:
                raise IntegrityError(
                    f"camera {camera.name!r} has {len(data)} bytes, expected {length} frames of "
                    f"{self.frame_bytes[camera.name]}; fetch the images of the same segment as the row"
                )
            frames = np.zeros((self.num_steps, camera.height, camera.width, 3), np.uint8)
            frames[:length] = np.frombuffer(data, np.uint8).reshape(length, camera.height, camera.width, 3)
            decoded[camera.name] = frames
        return decoded


def _text_bytes(name: str, text: str, capacity: int) -> bytes:
    data = text.encode()
    if len(data) > capacity or "\0" in text:
        raise DataError(
            f"{name} {text[:80]!r} takes {len(data)} bytes of UTF-8, expected at most {capacity} and no NUL; shorten it"
        )
    return data


def _schema(spec: EnvSpec, num_steps: int) -> pa.Schema:
    """Every column has a fixed width, so that every row has one and the same layout."""
    floats = {
        "proprio": num_steps * spec.proprio_dim,
        "actions": num_steps * spec.action_dim,
        "target_actions": num_steps * spec.action_dim,
        "rewards": num_steps,
    }
    return pa.schema(
        [
            *(pa.field(name, pa.binary(size), nullable=False) for name, size in _TEXT_BYTES.items()),
            pa.field("segment_index", pa.int64(), nullable=False),
            pa.field("policy_version", pa.int64(), nullable=False),
            pa.field("length", pa.int32(), nullable=False),
            pa.field("source", pa.uint8(), nullable=False),
            pa.field("is_last", pa.uint8(), nullable=False),
            pa.field("success", pa.uint8(), nullable=False),
            *(pa.field(name, _fixed_list(pa.float32(), size), nullable=False) for name, size in floats.items()),
            pa.field("interventions", _fixed_list(pa.uint8(), num_steps), nullable=False),
        ],
        metadata={"layout": _LAYOUT_VERSION, "spec": spec.digest, "num_steps": str(num_steps)},
    )


def _fixed_list(value: pa.DataType, size: int) -> pa.DataType:
    return pa.list_(pa.field("item", value, nullable=False), size)


def _constant_layout(schema: pa.Schema, spec: EnvSpec, num_steps: int) -> tuple[Array, np.dtype, int]:
    """An all-zero row as (row_bytes,) uint8, the structured dtype of its columns, and the size of its header."""
    columns = []
    for column in schema:
        if pa.types.is_fixed_size_binary(column.type):
            columns.append(pa.array([b"\0" * column.type.byte_width], column.type))
        elif pa.types.is_fixed_size_list(column.type):
            # Not FixedSizeListArray.from_arrays: for an empty list (P = 0) it divides by zero and kills the process.
            columns.append(pa.array([[0] * column.type.list_size], column.type))
        else:
            columns.append(pa.array([0], column.type))
    message = pa.RecordBatch.from_arrays(columns, schema=schema).serialize()
    template = np.frombuffer(message, np.uint8).copy()
    # Reading back is zero-copy, so the addresses of the buffers give the offsets without parsing the header.
    batch = pa.ipc.read_record_batch(message, schema)
    shapes = {
        "proprio": (num_steps, spec.proprio_dim),
        "actions": (num_steps, spec.action_dim),
        "target_actions": (num_steps, spec.action_dim),
    }
    names, formats, offsets = [], [], []
    for column, array in zip(schema, batch.columns, strict=True):
        kind = column.type
        if pa.types.is_fixed_size_binary(kind):
            dtype = np.dtype((np.bytes_, kind.byte_width))
        elif pa.types.is_fixed_size_list(kind):
            scalar = np.dtype(kind.value_type.to_pandas_dtype()).newbyteorder("<")
            dtype = np.dtype((scalar, shapes.get(column.name, (num_steps,))))
        else:
            dtype = np.dtype(kind.to_pandas_dtype()).newbyteorder("<")
        # An empty vector (P = 0) has no buffer of its own to point at: any place in the body will do.
        offset = array.buffers()[-1].address - message.address if dtype.itemsize else offsets[0]
        names.append(column.name)
        formats.append(dtype)
        offsets.append(offset)
    layout = np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": len(template)})
    return template, layout, min(offsets)
