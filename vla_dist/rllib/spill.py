"""Whole episodes on this machine's disk, while the replay does not take them."""

import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from vla_dist.core.errors import IntegrityError
from vla_dist.core.types import Segment
from vla_dist.data.segment_codec import SegmentCodec
from vla_dist.replay.archive.folder import ArchiveFolder
from vla_dist.replay.archive.parquet import EVERYTHING, PartHeader, PartWriter
from vla_dist.replay.archive.part_reader import PartReader
from vla_dist.replay.keys import episode_digest

_DAMAGED = ".damaged"


class EpisodeSpill:
    """A folder of files in the format of an archive, each of which is durable before ``put`` returns.

    Several processes may share it. ``vla-dist replay refill`` and ``read_archive`` take it as any archive.
    """

    def __init__(self, folder: str | Path, codec: SegmentCodec, *, buffer: str) -> None:
        """Raises Unreachable where the folder cannot be made."""
        self._path = Path(folder)
        self._folder = ArchiveFolder.at(self._path)
        self._folder.create()
        self._codec = codec
        self._buffer = buffer

    @property
    def num_bytes(self) -> int:
        """On disk, of what waits."""
        return sum(map(_size_of, self._path.glob("*.parquet")))

    def check(self, segments: Sequence[Segment]) -> None:
        """Raise DataError where an episode can neither be stored here nor in the replay."""
        self._codec.check(segments)

    def put(self, episodes: Sequence[Sequence[Segment]]) -> None:
        """Write them to a new file.

        Raises:
            DataError: one that does not fit the contract; nothing is written.
            Unreachable: the disk is full or gone; nothing is written.
        """
        header = PartHeader(
            spec_json=self._codec.spec.to_json(),
            num_steps=self._codec.num_steps,
            image_encodings={name: str(packer.encoding) for name, packer in self._codec.image_codecs.items()},
            buffer=self._buffer,
            incarnation="spill",
        )
        writer = PartWriter(self._codec, header)
        for number, segments in enumerate(episodes):
            encoded = self._codec.encode_all(segments)
            entry = {
                "episode_id": segments[0].episode_id,
                "digest": episode_digest(segments[0].episode_id),
                "length": sum(segment.length for segment in segments),
                "completion": number + 1,
                "completed_at_s": time.time(),
            }
            writer.add(entry, [(bytes(one.row), {k: bytes(v) for k, v in one.images.items()}) for one in encoded])
        self._folder.put(f"spill-{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.parquet", writer.finish())

    def names(self) -> list[str]:
        """Of the files that wait, the oldest first."""
        return self._folder.part_names()

    def read(self, name: str) -> list[list[Segment]]:
        """The episodes of a file.

        Raises:
            NotFound: another process has delivered it meanwhile.
            IntegrityError: damaged; it was renamed, so that it holds nothing up, and the message says to what.
        """
        try:
            with PartReader(self._folder, name) as part:
                groups = range(part.num_row_groups)
                return [e for group in groups for e in part.read(group, part.episodes(group, EVERYTHING))]
        except IntegrityError as error:
            damaged = self._path / f"{name}{_DAMAGED}"
            (self._path / name).rename(damaged)
            raise IntegrityError(f"{error}; it was set aside as {damaged}") from error

    def remove(self, name: str) -> None:
        """Forget a file whose episodes the replay has."""
        (self._path / name).unlink(missing_ok=True)


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
