"""Episodes as Parquet files that anybody can read: one row for each segment, one or more whole episodes a row group.

Numbers are compressed with zstd; images are as their ``ImageCodec`` packed them, and compressed again only where they
were raw. The footer's ``vla_dist`` entry is the JSON of a ``PartHeader``.

Dimensions: N segments, M valid steps of all of them, P proprio, A action.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vla_dist.core.errors import ConfigError, IntegrityError
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import SOURCES, Array, Source
from vla_dist.data.segment_codec import SegmentCodec
from vla_dist.replay.episodes import Entry

_FORMAT = 1
HEADER_KEY = b"vla_dist"
_ROW_GROUP_BYTES = 16 << 20
_TEXTS = ("episode_id", "robot_id", "task", "instruction")
_VECTORS = ("proprio", "actions", "target_actions")
STEPS = (*_VECTORS, "rewards", "interventions")
FIELDS = (*_TEXTS, "segment_index", "length", "policy_version", "source", "is_last", "success")
MARKS = ("completion", "completed_at_s")
_STEP_LIST, _VECTOR_LIST = ".list.element", ".list.element.list.element"

Payload = Sequence[tuple[bytes, Mapping[str, bytes]]]
"""Row and packed frames of each segment of an episode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartHeader:
    """What a file says about itself."""

    spec_json: str
    num_steps: int
    """T."""
    image_encodings: Mapping[str, str]
    buffer: str
    """Name of the buffer it was written from."""
    incarnation: str
    """Of that buffer: another one each time it is created anew."""
    completions: Sequence[int] = ()
    """Numbers of its episodes in the order in which that buffer saw them become whole."""
    digests: Sequence[str] = ()
    """See ``keys.episode_digest``, of the same episodes."""

    @property
    def spec(self) -> EnvSpec:
        return EnvSpec.from_json(self.spec_json)

    def to_json(self) -> str:
        return json.dumps({"format": _FORMAT, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: bytes) -> "PartHeader":
        """Raises ValueError, KeyError or TypeError."""
        fields = json.loads(text)
        if fields.pop("format") != _FORMAT:
            raise ValueError(f"another format than {_FORMAT}")
        header = cls(**fields)
        EnvSpec.from_json(header.spec_json)
        return header


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeFilter:
    """Which episodes of an archive are wanted; the default: all."""

    tasks: Collection[str] | None = None
    sources: Collection[Source] | None = None
    success: bool | None = None
    min_policy_version: int | None = None
    """Of each segment; experts and persons act as version 0."""
    max_policy_version: int | None = None

    def __post_init__(self) -> None:
        strangers = sorted(set(self.sources or ()) - set(SOURCES))
        if strangers:
            raise ConfigError(f"sources {strangers} must be among {', '.join(SOURCES)}")

    def accepts(self, *, task: str, source: str, success: bool, policy_versions: Array) -> bool:
        """Whether an episode with these properties is wanted; ``policy_versions`` of each segment."""
        low, high = self.min_policy_version, self.max_policy_version
        return (
            (self.tasks is None or task in self.tasks)
            and (self.sources is None or source in self.sources)
            and (self.success is None or success == self.success)
            and (low is None or int(policy_versions.min()) >= low)
            and (high is None or int(policy_versions.max()) <= high)
        )


EVERYTHING = EpisodeFilter()


class PartWriter:
    """Builds one file in memory."""

    def __init__(self, codec: SegmentCodec, header: PartHeader) -> None:
        self._codec = codec
        self._header = header
        self._sink = pa.BufferOutputStream()
        self._schema = _schema(codec)
        cameras = {image_column(name): packer for name, packer in codec.image_codecs.items()}
        numbers = {name: "zstd" for name in _column_paths(self._schema) if name not in cameras}
        frames = {name: "zstd" if packer.is_raw else "none" for name, packer in cameras.items()}
        floats = [f"{name}{_VECTOR_LIST}" for name in _VECTORS] + [f"rewards{_STEP_LIST}"]
        self._writer = pq.ParquetWriter(
            self._sink,
            self._schema,
            compression=cast(Any, numbers | frames),
            use_dictionary=cast(Any, [*_TEXTS, "source"]),
            # The bytes of floats side by side by significance: neighbours differ least in the first ones.
            column_encoding=dict.fromkeys(floats, "BYTE_STREAM_SPLIT"),
            write_statistics=cast(Any, [*FIELDS, *MARKS]),
            write_page_checksum=True,
        )
        self._completions: list[int] = []
        self._digests: list[str] = []
        self._rows: list[bytes] = []
        self._frames: dict[str, list[bytes]] = {name: [] for name in codec.image_codecs}
        self._marks: list[tuple[int, float]] = []
        self._num_bytes = 0
        self.num_steps = 0

    @property
    def num_episodes(self) -> int:
        return len(self._completions)

    @property
    def num_bytes(self) -> int:
        """So far: compressed, but for the row group at hand."""
        return self._sink.tell() + self._num_bytes

    def add(self, entry: Entry, payload: Payload) -> None:
        """One whole episode.

        Raises:
            IntegrityError: a segment that is damaged, or another one; the file goes on without the episode.
        """
        for index, (row, frames) in enumerate(payload):
            try:
                record = self._codec.require_intact(row, frames)
            except IntegrityError as error:
                raise IntegrityError(f"episode {entry['episode_id']!r}, segment {index}: {error}") from error
            length = min(self._codec.num_steps, entry["length"] - index * self._codec.num_steps)
            expected = (entry["episode_id"], index, length, index == len(payload) - 1)
            found = (
                record["episode_id"].decode(),
                int(record["segment_index"]),
                int(record["length"]),
                bool(record["is_last"]),
            )
            if found != expected:
                raise IntegrityError(
                    f"episode {entry['episode_id']!r}, segment {index} holds (episode, segment, length, is last) "
                    f"{found}, expected {expected}"
                )
        for row, frames in payload:
            self._rows.append(row)
            for name, packed in frames.items():
                self._frames[name].append(packed)
            self._marks.append((entry["completion"], entry["completed_at_s"]))
            self._num_bytes += len(row) + sum(map(len, frames.values()))
        self.num_steps += entry["length"]
        self._completions.append(entry["completion"])
        self._digests.append(entry["digest"])
        if self._num_bytes >= _ROW_GROUP_BYTES:
            self._flush()

    def finish(self) -> pa.Buffer:
        """The whole file."""
        self._flush()
        fields = {**asdict(self._header), "completions": self._completions, "digests": self._digests}
        self._writer.add_key_value_metadata({HEADER_KEY.decode(): PartHeader(**fields).to_json()})
        self._writer.close()
        return self._sink.getvalue()

    def _flush(self) -> None:
        if not self._rows:
            return
        records, layout = self._codec.decode_rows(self._rows), self._codec.layout
        lengths = records["length"].astype(np.int64)
        steps = records["steps"][np.arange(self._codec.num_steps) < lengths[:, None]]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        columns: dict[str, pa.Array] = {
            name: pa.array([text.decode() for text in records[name].tolist()], pa.string()) for name in _TEXTS
        }
        for name in ("segment_index", "length", "policy_version"):
            columns[name] = pa.array(records[name].astype(np.int64))
        columns["source"] = pa.array([SOURCES[number] for number in records["source"].tolist()], pa.string())
        for name in ("is_last", "success"):
            columns[name] = pa.array(records[name] != 0)
        for name in _VECTORS:
            columns[name] = _lists(offsets, _vectors(steps[:, getattr(layout, name)]))
        columns["rewards"] = _lists(offsets, pa.array(steps[:, layout.reward], pa.float32()))
        columns["interventions"] = _lists(offsets, pa.array(steps[:, layout.intervention] != 0))
        for name, frames in self._frames.items():
            columns[image_column(name)] = pa.array(frames, pa.binary())
        completions, times = zip(*self._marks, strict=True)
        columns["completion"] = pa.array(completions, pa.int64())
        columns["completed_at_s"] = pa.array(times, pa.float64())
        table = pa.Table.from_arrays([columns[field.name] for field in self._schema], schema=self._schema)
        self._writer.write_table(table, row_group_size=len(self._rows))
        self._rows, self._marks, self._num_bytes = [], [], 0
        self._frames = {name: [] for name in self._frames}


def image_column(camera: str) -> str:
    return f"image_{camera}"


def _schema(codec: SegmentCodec) -> pa.Schema:
    vectors, floats = pa.list_(pa.list_(pa.float32())), pa.list_(pa.float32())
    kinds: dict[str, pa.DataType] = {
        **dict.fromkeys(_TEXTS, pa.string()),
        **dict.fromkeys(("segment_index", "length", "policy_version"), pa.int64()),
        "source": pa.string(),
        **dict.fromkeys(("is_last", "success"), pa.bool_()),
        **dict.fromkeys(_VECTORS, vectors),
        "rewards": floats,
        "interventions": pa.list_(pa.bool_()),
        **{image_column(name): pa.binary() for name in codec.image_codecs},
        "completion": pa.int64(),
        "completed_at_s": pa.float64(),
    }
    return pa.schema([pa.field(name, kind) for name, kind in kinds.items()])


def _column_paths(schema: pa.Schema) -> list[str]:
    """As Parquet names the leaves."""
    suffixes = {**dict.fromkeys(_VECTORS, _VECTOR_LIST), "rewards": _STEP_LIST, "interventions": _STEP_LIST}
    return [field.name + suffixes.get(field.name, "") for field in schema]


def _vectors(steps: Array) -> pa.Array:
    """(M, D) to M lists."""
    num, width = steps.shape
    offsets = np.arange(num + 1, dtype=np.int32) * width
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(steps.reshape(-1), pa.float32()))


def _lists(offsets: Array, values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)
