"""Segments to bytes and back: one Arrow record batch of one row, always with the same layout.

For a fixed schema without nulls and variable lengths, Arrow writes the same header and the same buffer offsets every
time. So encoding is a copy of a template and a few assignments, and a whole array of rows is decoded as strided NumPy
views after one comparison with the header. The checksum is seeded by the spec, so ``decode`` refuses the rows of
another one even where their layouts are the same.

All numbers of a step lie side by side in the column ``steps``, so that the steps of a window are one range of bytes
and can be fetched without the rest of the row. Beside what the robot recorded, each step holds the sum of the rewards
from it to the end of its segment, as a float32 and the float32 of what that one rounds off: returns-to-go then need no
other step of the segment.

Images are not part of the row: see ``image_codec``.

Dimensions: N rows, T segment steps, P proprio, A action, D = P + 2 A + 4 numbers of a step.
"""

import functools
import hashlib
import math
import operator
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash

from vla_dist.core.errors import ConfigError, DataError, IntegrityError
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import SOURCES, Array, Segment
from vla_dist.data.image_codec import RAW, ImageCodec, ImageEncoding
from vla_dist.data.row_layout import TEXT_BYTES, StepLayout, arrow_schema, column_of, constant_layout, packed_fields

_CHECKSUM = struct.Struct("<Q")
_COLUMNS = ("proprio", "actions", "target_actions", "rewards", "interventions")
_NUMBERS = _COLUMNS[:-1]
_texts_of = operator.attrgetter(*TEXT_BYTES)
_shapes_of = operator.attrgetter(*(f"{name}.shape" for name in _COLUMNS))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncodedSegment:
    """A segment as it is stored."""

    row: bytes | memoryview
    """A valid Arrow record batch message of ``SegmentCodec.row_bytes`` bytes; everything but the images."""
    images: Mapping[str, bytes | memoryview] = field(default_factory=dict)
    """camera name -> the ``length`` valid frames as the camera's ``ImageCodec`` packs them."""
    segment_return: float = 0.0
    """Sum of its valid rewards, float64."""
    intervened: bool = False
    """Whether a person had taken over in any valid step."""


class SegmentCodec:
    """Encodes and decodes the segments of one spec and one T.

    Steps after ``Segment.length`` are padding: they are stored as zeros (frames not at all) whatever they held.
    """

    def __init__(
        self, spec: EnvSpec, num_steps: int, image_encodings: Mapping[str, ImageEncoding] | None = None
    ) -> None:
        """
        Args:
            spec: gives P, A and the cameras.
            num_steps: T, rows of every segment.
            image_encodings: camera name -> how its frames are stored; raw where not given.

        Raises:
            ConfigError: no step, or an encoding for a camera that the spec lacks.
        """
        if num_steps < 1:
            raise ConfigError(f"num_steps {num_steps} must be at least 1")
        encodings = dict(image_encodings or {})
        unknown = set(encodings) - {camera.name for camera in spec.cameras}
        if unknown:
            raise ConfigError(
                f"image encodings for {sorted(unknown)}, which spec {spec.name!r} lacks; it has "
                f"{sorted(camera.name for camera in spec.cameras)}"
            )
        self.spec = spec
        self.num_steps = num_steps
        self.layout = StepLayout(spec.proprio_dim, spec.action_dim)
        self.image_codecs = {c.name: ImageCodec(c, encodings.get(c.name, RAW)) for c in spec.cameras}
        self.schema = arrow_schema(spec, num_steps, self.layout)
        template, self.row_dtype, header_bytes = constant_layout(self.schema, num_steps, self.layout)
        proprio, action = (num_steps, spec.proprio_dim), (num_steps, spec.action_dim)
        self._shapes = (proprio, action, action, (num_steps,), (num_steps,))
        reward, intervention = self.layout.reward, self.layout.intervention
        scalars = (slice(reward, reward + 1), slice(intervention, intervention + 1))
        self._places = (self.layout.proprio, self.layout.actions, self.layout.target_actions, *scalars)
        self._header = template[:header_bytes]
        self._template = bytearray(template.tobytes())
        self._fields, self._fields_offset = packed_fields(self.row_dtype)
        # Specs may have rows of one layout and mean other numbers.
        self._seed = int(spec.digest[:16], 16)
        self.checksum_offset = column_of(self.row_dtype, "checksum")[1]
        self.steps_offset = column_of(self.row_dtype, "steps")[1]
        self.step_bytes = 4 * self.layout.num_columns
        self.schema_id = hashlib.sha256(self.schema.serialize().to_pybytes() + self._header.tobytes()).hexdigest()[:16]

    @property
    def row_bytes(self) -> int:
        return len(self._template)

    @property
    def largest_bytes(self) -> int:
        """Of a row and all its frames, unless compression makes them more."""
        return self.row_bytes + self.num_steps * sum(codec.frame_bytes for codec in self.image_codecs.values())

    def encode(self, segment: Segment) -> EncodedSegment:
        """Raises DataError where the segment does not fit the spec or holds a number that is not finite."""
        return self.encode_all([segment])[0]

    def encode_all(
        self, segments: Sequence[Segment], frames: Sequence[Mapping[str, bytes | memoryview]] | None = None
    ) -> list[EncodedSegment]:
        """The same for many, several times as fast as one by one.

        Args:
            segments: to encode.
            frames: of each segment, packed before by ``image_codecs`` like this codec's and in their order; then
                ``Segment.images`` are not looked at. Packing JPEG a second time would lose a little more.
        """
        return self.check(segments, frames).encode(0, len(segments))

    def check(
        self, segments: Sequence[Segment], frames: Sequence[Mapping[str, bytes | memoryview]] | None = None
    ) -> "CheckedSegments":
        """Everything that ``encode_all`` may refuse is refused here; what takes long is done when it is asked for."""
        for segment in segments:
            self._require_shapes(segment)
            if frames is None:
                self._require_images(segment)
        if not segments:
            return CheckedSegments(self, (), None, {}, ())
        # One array of all segments: one operation for each costs more than the copy.
        columns = {name: np.concatenate([getattr(segment, name) for segment in segments]) for name in _COLUMNS}
        if not all(_is_surely_finite(columns[name]) for name in _NUMBERS):
            steps = self.fill_rows(segments, columns)[1]
            if not np.isfinite(steps).all():
                raise DataError(_not_finite(segments, steps, self.layout))
        texts: list[Sequence[bytes]] = []
        last = None
        for segment in segments:
            # Mostly those of one episode side by side.
            if (names := _texts_of(segment)) != last:
                last = names
                texts.append([_text_bytes(*one) for one in zip(TEXT_BYTES, names, TEXT_BYTES.values(), strict=True)])
            else:
                texts.append(texts[-1])
        return CheckedSegments(self, segments, frames, columns, texts)

    def fill_rows(self, segments: Sequence[Segment], columns: Mapping[str, Array]) -> tuple[bytearray, Array, Array]:
        """Rows of which only the steps are filled in, those (N, T, D), and (N,) float64, the sums of the rewards.

        Args:
            segments: N of them.
            columns: (N * T, ...) their arrays one after the other.
        """
        num, layout = len(segments), self.layout
        buffer = self._template * num
        strides = (self.row_bytes, self.step_bytes, 4)
        steps = np.ndarray((num, self.num_steps, layout.num_columns), "<f4", buffer, self.steps_offset, strides)
        # What float32 cannot hold becomes infinite, which ``check`` refuses.
        with np.errstate(over="ignore", invalid="ignore"):
            for name, place in zip(_COLUMNS, self._places, strict=True):
                steps[..., place] = columns[name].reshape(num, self.num_steps, -1)
            for mine, segment in zip(steps, segments, strict=True):
                if segment.length < self.num_steps:
                    mine[segment.length :] = 0
            to_end = steps[:, ::-1, layout.reward].cumsum(axis=1, dtype=np.float64)[:, ::-1]
            steps[..., layout.segment_return] = to_end
            steps[..., layout.segment_return + 1] = to_end - steps[..., layout.segment_return]
        return buffer, steps, to_end[:, 0]

    def finish_row(
        self,
        buffer: bytearray,
        start: int,
        segment: Segment,
        texts: Sequence[bytes],
        images: Mapping[str, bytes | memoryview],
    ) -> memoryview:
        """The row at ``start``, with all that goes into it beside the steps."""
        checksums = [xxhash.xxh3_64_intdigest(data) for data in images.values()]
        self._fields.pack_into(
            buffer,
            start + self._fields_offset,
            *texts,
            segment.segment_index,
            segment.policy_version,
            segment.length,
            SOURCES.index(segment.source),
            segment.is_last,
            segment.success,
            0,
            *checksums,
        )
        row = memoryview(buffer)[start : start + self.row_bytes].toreadonly()
        _CHECKSUM.pack_into(buffer, start + self.checksum_offset, xxhash.xxh3_64_intdigest(row, self._seed))
        return row

    def pack_images(self, segment: Segment) -> dict[str, bytes | memoryview]:
        """camera name -> the valid frames as they are stored."""
        return {name: codec.pack(segment.images[name][: segment.length]) for name, codec in self.image_codecs.items()}

    def decode(self, row: bytes | memoryview, images: Mapping[str, bytes | memoryview] | None = None) -> Segment:
        """Inverse of ``encode``; arrays are read-only views of ``row``, the images are copies.

        Raises:
            IntegrityError: wrong size, header or checksum, or a field that no encoder writes.
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
            texts = {name: record[name].decode() for name in TEXT_BYTES}
        except UnicodeDecodeError as error:
            raise IntegrityError(f"row with text that is not UTF-8 ({error}); append the segment again") from error
        steps, layout = record["steps"], self.layout
        # Outside of the try: damaged frames say so themselves, and the row may be whole.
        frames = self._unpack_images(record, images or {}, length)
        try:
            segment = Segment(
                **texts,
                segment_index=int(record["segment_index"]),
                policy_version=int(record["policy_version"]),
                source=SOURCES[source],
                is_last=bool(record["is_last"]),
                success=bool(record["success"]),
                length=length,
                proprio=steps[:, layout.proprio],
                actions=steps[:, layout.actions],
                target_actions=steps[:, layout.target_actions],
                rewards=steps[:, layout.reward],
                interventions=steps[:, layout.intervention] != 0,
                images=frames,
            )
        except DataError as error:
            raise IntegrityError(f"row that no encoder writes ({error}); append the segment again") from error
        self._require_checksum(row, record)
        return segment

    def require_intact(self, row: bytes | memoryview, images: Mapping[str, bytes | memoryview]) -> np.void:
        """One record as in ``decode_rows``, its frames left packed.

        Raises:
            IntegrityError: row or frames differ from their checksums.
        """
        record = self.decode_rows([row])[0]
        self._require_checksum(row, record)
        for number, name in enumerate(self.image_codecs):
            _require_same_frames(name, images[name], record, number)
        return record

    def _require_checksum(self, row: bytes | memoryview, record: np.void) -> None:
        blank = bytearray(row)
        blank[self.checksum_offset : self.checksum_offset + 8] = bytes(8)
        if xxhash.xxh3_64_intdigest(blank, self._seed) != int(record["checksum"]):
            raise IntegrityError(
                f"row of {record['episode_id'].decode()!r}/{record['segment_index']} differs from its checksum; the "
                f"bytes were damaged or written for another spec than {self.spec.name!r}, append the segment again"
            )

    def decode_rows(self, rows: Sequence[bytes | memoryview]) -> Array:
        """Structured (N,) view of one joined copy of ``rows``; fields named as in ``row_dtype``.

        Shapes: ``steps`` (N, T, D), see ``layout``, ``image_checksums`` (N, cameras), the rest (N,). ``source`` indexes
        ``core.types.SOURCES``.

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
        if _shapes_of(segment) == self._shapes:
            return
        for name, shape in zip(_COLUMNS, self._shapes, strict=True):
            if getattr(segment, name).shape != shape:
                raise DataError(
                    f"segment {segment.episode_id}/{segment.segment_index}: {name} has shape "
                    f"{getattr(segment, name).shape}, spec {self.spec.name!r} with T = {self.num_steps} expects {shape}"
                )

    def _require_images(self, segment: Segment) -> None:
        if set(segment.images) != set(self.image_codecs):
            raise DataError(
                f"segment {segment.episode_id}/{segment.segment_index} has cameras {sorted(segment.images)}, spec "
                f"{self.spec.name!r} expects {sorted(self.image_codecs)}; send every camera of the spec and no other"
            )
        for camera in self.spec.cameras:
            frames = segment.images[camera.name]
            shape = (self.num_steps, camera.height, camera.width, 3)
            if frames.shape != shape or frames.dtype != np.uint8:
                raise DataError(
                    f"segment {segment.episode_id}/{segment.segment_index}: camera {camera.name!r} has "
                    f"{frames.dtype} frames of shape {frames.shape}, expected uint8 of {shape}"
                )

    def _unpack_images(
        self, record: np.void, images: Mapping[str, bytes | memoryview], length: int
    ) -> dict[str, Array]:
        unpacked = {}
        for number, (name, codec) in enumerate(self.image_codecs.items()):
            data = images.get(name, b"")
            frames = codec.unpack(data, length)
            _require_same_frames(name, data, record, number)
            padded = np.zeros((self.num_steps, *frames.shape[1:]), np.uint8)
            padded[:length] = frames
            unpacked[name] = padded
        return unpacked


class CheckedSegments:
    """Segments that fit, encoded some at a time: so that a server can store the first while the next are encoded."""

    def __init__(
        self,
        codec: SegmentCodec,
        segments: Sequence[Segment],
        frames: Sequence[Mapping[str, bytes | memoryview]] | None,
        columns: Mapping[str, Array],
        texts: Sequence[Sequence[bytes]],
    ) -> None:
        """Made by ``SegmentCodec.check``: ``columns`` as ``SegmentCodec.fill_rows`` takes them."""
        self._codec = codec
        self._segments = segments
        self._frames = frames
        self._columns = columns
        self._texts = texts

    def encode(self, start: int, stop: int) -> list[EncodedSegment]:
        """The segments from ``start`` to before ``stop``."""
        codec, segments, encoded = self._codec, self._segments[start:stop], []
        if not segments:
            return encoded
        places = slice(start * codec.num_steps, stop * codec.num_steps)
        columns = {name: column[places] for name, column in self._columns.items()}
        buffer, steps, returns = codec.fill_rows(segments, columns)
        intervened = np.logical_or.reduce(steps[..., codec.layout.intervention], axis=1)
        facts = zip(segments, self._texts[start:stop], returns.tolist(), intervened.tolist(), strict=True)
        for place, (segment, texts, total, taken_over) in enumerate(facts):
            images = codec.pack_images(segment) if self._frames is None else self._frames[start + place]
            row = codec.finish_row(buffer, place * codec.row_bytes, segment, texts, images)
            encoded.append(EncodedSegment(row=row, images=images, segment_return=total, intervened=taken_over))
        return encoded


def _is_surely_finite(numbers: Array) -> bool:
    """Finds nearly all that are, in a fraction of the time of looking at each number.

    A sum of squares is finite where every number is, unless some are huge; what lies beyond ``length`` counts too.
    """
    return numbers.dtype == np.float32 and math.isfinite(np.vdot(numbers, numbers))


def _require_same_frames(camera: str, data: bytes | memoryview, record: np.void, number: int) -> None:
    if xxhash.xxh3_64_intdigest(data) != int(record["image_checksums"][number]):
        raise IntegrityError(
            f"camera {camera!r}: the frames differ from their checksum; the bytes were damaged, or belong to another "
            "segment than the row"
        )


def _not_finite(segments: Sequence[Segment], steps: Array, layout: StepLayout) -> str:
    columns = {
        "proprio": layout.proprio,
        "actions": layout.actions,
        "target_actions": layout.target_actions,
        "rewards": slice(layout.reward, layout.num_columns),
    }
    worst = int((~np.isfinite(steps)).any(axis=(1, 2)).argmax())
    segment = segments[worst]
    bad = [name for name, where in columns.items() if not np.isfinite(steps[worst][:, where]).all()]
    return (
        f"segment {segment.episode_id}/{segment.segment_index}: {' and '.join(bad)} holds NaN or infinity within its "
        f"{segment.length} valid steps; every number and the sum of the rewards must be finite. Fix the sensor or end "
        "the episode before it."
    )


@functools.lru_cache(4096)
def _text_bytes(name: str, text: str, capacity: int) -> bytes:
    data = text.encode()
    if len(data) > capacity or "\0" in text:
        raise DataError(
            f"{name} {text[:80]!r} takes {len(data)} bytes of UTF-8, expected at most {capacity} and no NUL; shorten it"
        )
    return data
