"""Reading the files of an archive, a row group at a time.

Dimensions: T segment steps.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vla_dist.core.errors import IntegrityError, Unreachable
from vla_dist.core.types import Array, Segment
from vla_dist.data.image_codec import ImageCodec, ImageEncoding
from vla_dist.data.segment_codec import SegmentCodec
from vla_dist.replay.archive.folder import ArchiveFolder
from vla_dist.replay.archive.parquet import FIELDS, HEADER_KEY, MARKS, STEPS, EpisodeFilter, PartHeader, image_column


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchivedEpisode:
    """What a file tells about an episode without its steps."""

    episode_id: str
    task: str
    length: int
    completed_at_s: float
    """By the clock of the server that saw it become whole."""
    first_row: int
    """Within the row group."""
    num_segments: int

    @property
    def rows(self) -> range:
        return range(self.first_row, self.first_row + self.num_segments)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedEpisode:
    """An episode whose frames are left packed."""

    segments: Sequence[Segment]
    """Without images."""
    frames: Sequence[Mapping[str, bytes | memoryview]]
    """Of each segment: camera -> packed frames."""


class PartReader:
    """One file, a row group at a time. Close it, or use it in a ``with`` block."""

    def __init__(self, folder: ArchiveFolder, name: str) -> None:
        """
        Raises:
            IntegrityError: damaged, or no file of ours.
            NotFound: no such file.
            Unreachable: no answer.
        """
        self.name = f"{folder.name}/{name}"
        self.file_name = name
        self._folder = folder
        self._file = folder.open(name)
        try:
            with self._reported():
                self._parquet = pq.ParquetFile(self._file, page_checksum_verification=True)
                self.header = PartHeader.from_json(self._parquet.metadata.metadata[HEADER_KEY])
        except BaseException:
            self._file.close()
            raise
        self.num_row_groups = self._parquet.num_row_groups
        spec = self.header.spec
        self._codecs = {
            camera.name: ImageCodec(camera, ImageEncoding.parse(self.header.image_encodings[camera.name]))
            for camera in spec.cameras
        }

    def __enter__(self) -> "PartReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def episodes(self, group: int, where: EpisodeFilter) -> list[ArchivedEpisode]:
        """Those that are wanted; only small columns are read. Errors as the constructor."""
        with self._reported():
            table = self._parquet.read_row_group(group, columns=[*FIELDS, *MARKS])
            texts = {name: table[name].to_pylist() for name in ("episode_id", "task", "source")}
            numbers = {name: table[name].to_numpy() for name in ("is_last", "success", "policy_version", "length")}
            ends = np.flatnonzero(numbers["is_last"]) + 1
            times = table["completed_at_s"].to_numpy()
            if not len(ends) or ends[-1] != len(table):
                raise ValueError("an episode without its end")
            found = []
            for first, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
                if where.accepts(
                    task=texts["task"][first],
                    source=texts["source"][first],
                    success=bool(numbers["success"][end - 1]),
                    policy_versions=numbers["policy_version"][first:end],
                ):
                    found.append(
                        ArchivedEpisode(
                            episode_id=texts["episode_id"][first],
                            task=texts["task"][first],
                            length=int(numbers["length"][first:end].sum()),
                            completed_at_s=float(times[first]),
                            first_row=first,
                            num_segments=end - first,
                        )
                    )
        return found

    def read(self, group: int, episodes: Sequence[ArchivedEpisode]) -> Iterator[list[Segment]]:
        """The segments of episodes that ``episodes`` gave for this row group. Errors as the constructor."""
        for episode, rows in self._rows_of(group, episodes):
            with self._reported():
                segments = [rows.segment(row, rows.images(row)) for row in episode.rows]
            yield segments

    def read_packed(
        self, group: int, episodes: Sequence[ArchivedEpisode], codec: SegmentCodec
    ) -> Iterator[PackedEpisode]:
        """The same, with frames as ``codec`` packs them: as they are, where the file has them so."""
        is_same = {name: codec.image_codecs[name].encoding == mine.encoding for name, mine in self._codecs.items()}
        for episode, rows in self._rows_of(group, episodes):
            with self._reported():
                segments = [rows.segment(row, {}) for row in episode.rows]
                frames = [
                    {
                        name: rows.packed(name, row) if is_same[name] else packer.pack(rows.frames(name, row))
                        for name, packer in codec.image_codecs.items()
                    }
                    for row in episode.rows
                ]
            yield PackedEpisode(segments=segments, frames=frames)

    def _rows_of(self, group: int, episodes: Sequence[ArchivedEpisode]) -> Iterator[tuple[ArchivedEpisode, "_Rows"]]:
        if not episodes:
            return
        with self._reported():
            columns = [*FIELDS, *STEPS, *(image_column(name) for name in self._codecs)]
            table = self._parquet.read_row_group(group, columns=columns)
            rows = _Rows(table.combine_chunks(), self.header, self._codecs)
            for episode in episodes:
                rows.require_in_order(episode)
        for episode in episodes:
            yield episode, rows

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except Unreachable:
            raise
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            self._folder.require_readable(self.file_name)
            reason = str(error).partition("\n")[0]
            raise IntegrityError(
                f"{self.name} is damaged or no archive of episodes ({type(error).__name__}: {reason}); take it out of "
                "the folder, or read with on_error='skip'"
            ) from error


class _Rows:
    """A row group in memory."""

    def __init__(self, table: pa.Table, header: PartHeader, codecs: Mapping[str, ImageCodec]) -> None:
        spec = header.spec
        self._num_steps, self._codecs = header.num_steps, codecs
        self._fields = {name: table[name].to_pylist() for name in FIELDS}
        lengths = np.array(self._fields["length"], np.int64)
        self._offsets = np.concatenate([[0], np.cumsum(lengths)])
        widths = {"proprio": spec.proprio_dim, "actions": spec.action_dim, "target_actions": spec.action_dim}
        self._steps: dict[str, Array] = {}
        for name in STEPS:
            column = _only_chunk(table, name)
            if not np.array_equal(column.value_lengths().to_numpy(zero_copy_only=False), lengths):
                raise ValueError(f"column {name} has another number of steps than length says")
            values = column.flatten()
            if name in widths:
                values = values.flatten()
                steps = values.to_numpy(zero_copy_only=False).reshape(int(lengths.sum()), widths[name])
            else:
                steps = values.to_numpy(zero_copy_only=False)
            self._steps[name] = steps
        self._frames = {name: _only_chunk(table, image_column(name)) for name in codecs}

    def require_in_order(self, episode: ArchivedEpisode) -> None:
        if [self._fields["segment_index"][row] for row in episode.rows] != list(range(episode.num_segments)):
            raise ValueError(f"the segments of {episode.episode_id!r} are not in order")

    def segment(self, row: int, images: Mapping[str, Array]) -> Segment:
        first, end = int(self._offsets[row]), int(self._offsets[row + 1])
        fields: dict[str, Any] = {name: column[row] for name, column in self._fields.items()}
        steps: dict[str, Any] = {name: self._padded(column[first:end]) for name, column in self._steps.items()}
        return Segment(**fields, **steps, images=images)

    def images(self, row: int) -> dict[str, Array]:
        """camera -> (T, H, W, 3)."""
        return {name: self._padded(self.frames(name, row)) for name in self._codecs}

    def frames(self, camera: str, row: int) -> Array:
        """(length, H, W, 3)."""
        return self._codecs[camera].unpack(self.packed(camera, row), self._fields["length"][row])

    def packed(self, camera: str, row: int) -> memoryview:
        return memoryview(self._frames[camera][row].as_buffer()).cast("B")

    def _padded(self, steps: Array) -> Array:
        whole = np.zeros((self._num_steps, *steps.shape[1:]), steps.dtype)
        whole[: len(steps)] = steps
        return whole


def _only_chunk(table: pa.Table, name: str) -> Any:
    column = table[name]
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)
