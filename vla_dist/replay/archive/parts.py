"""The files of an archive as a whole: their names, what they hold together, and reading them by row group."""

import contextlib
import json
import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from typing import Literal

from vla_dist.core.errors import ConfigError, ContractMismatch, IntegrityError, NotFound, Unreachable
from vla_dist.replay.archive.folder import PART_SUFFIX, ArchiveFolder
from vla_dist.replay.archive.parquet import EpisodeFilter, PartHeader, PartWriter
from vla_dist.replay.archive.part_reader import ArchivedEpisode, PartReader
from vla_dist.replay.episodes import Entry
from vla_dist.replay.shards import ShardedReplayTable
from vla_dist.replay.table import RedisReplayTable

_PATIENCE_S = 10.0
_HEADER_THREADS = 8
_QUARANTINE_SUFFIX = ".quarantine.jsonl"

_log = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]
"""What a damaged or foreign file does: end the reading, or be logged and left out."""


class KnownEpisodes:
    """The episodes that the files of a folder hold; about 100 bytes of memory for each."""

    def __init__(self, folder: ArchiveFolder) -> None:
        self._folder = folder
        self._digests: set[str] = set()
        self._seen: set[str] = set()

    def __contains__(self, entry: Entry) -> bool:
        return entry["digest"] in self._digests

    def __len__(self) -> int:
        return len(self._digests)

    def learn(self) -> list[PartHeader]:
        """Look for files that were not there before; their headers. A damaged file holds no episode.

        Raises:
            Unreachable: the folder does not answer, or is not there any more.
        """
        try:
            names = [name for name in self._folder.part_names() if name not in self._seen]
        except NotFound as error:
            raise Unreachable(f"archive {self._folder.name!r} is gone; was it removed, or a disk unmounted?") from error
        with ThreadPoolExecutor(_HEADER_THREADS) as threads:
            headers = [header for header in threads.map(self._header, names) if header is not None]
        self._seen.update(names)
        for header in headers:
            self._digests.update(header.digests)
        return headers

    def _header(self, name: str) -> PartHeader | None:
        try:
            with PartReader(self._folder, name) as part:
                return part.header
        except (IntegrityError, NotFound) as error:
            _log.warning("%s", error)
            return None


def open_for_writing(folder: ArchiveFolder, table: RedisReplayTable | ShardedReplayTable) -> KnownEpisodes:
    """Make the folder where it is missing; what it holds.

    Raises:
        ContractMismatch, ConfigError: episodes of another contract, or T.
        Unreachable: no answer.
    """
    folder.create()
    known = KnownEpisodes(folder)
    for header in known.learn():
        require_same_contract(table, header, folder.name)
    return known


def require_same_contract(table: RedisReplayTable | ShardedReplayTable, header: PartHeader, archive: str) -> None:
    """Raise ContractMismatch or ConfigError where a buffer cannot hold the episodes of a file."""
    differences = table.spec.differences(header.spec)
    if differences:
        raise ContractMismatch(
            f"buffer {table.config.name!r} ({table.spec.name}) and archive {archive!r} ({header.spec.name}) hold "
            f"episodes of different contracts: {'; '.join(differences)}. Use another folder or buffer"
        )
    if header.num_steps != table.config.num_steps:
        raise ConfigError(
            f"archive {archive!r} has segments of {header.num_steps} steps, buffer {table.config.name!r} of "
            f"{table.config.num_steps}; use another folder, or a buffer with num_steps {header.num_steps}"
        )


def incarnation_of(table: RedisReplayTable) -> str:
    """Time and chance, stored once with the buffer: another one when a buffer of this name is created anew."""
    proposed = f"{datetime.now(timezone.utc):%Y%m%dT%H%M%S%f}-{uuid.uuid4().hex[:8]}"
    key = table.keys.config
    replies = table.link.call(
        [("HSETNX", key, "incarnation", proposed), ("HGET", key, "incarnation")], timeout_s=_PATIENCE_S
    )
    return replies[1].decode()


def part_name(incarnation: str, first: Entry) -> str:
    """Sorts in the order of completion. The random end keeps two plans apart whatever Redis forgot between them."""
    return f"{incarnation}-{first['completion']:012d}-{uuid.uuid4().hex[:8]}{PART_SUFFIX}"


def new_part(table: RedisReplayTable) -> PartWriter:
    """For episodes of this buffer."""
    header = PartHeader(
        spec_json=table.spec.to_json(),
        num_steps=table.config.num_steps,
        image_encodings={name: str(packer.encoding) for name, packer in table.codec.image_codecs.items()},
        buffer=table.config.name,
        incarnation=incarnation_of(table),
    )
    return PartWriter(table.codec, header)


def add_episode(table: RedisReplayTable, writer: PartWriter, entry: Entry, damaged: dict[str, str]) -> bool:
    """Put an episode into ``writer``, or the reason why not into ``damaged``; False where it left the buffer."""
    try:
        payload = table.reader.payload(entry, timeout_s=_PATIENCE_S)
        if payload:
            writer.add(entry, payload)
        return bool(payload)
    except IntegrityError as error:
        _log.warning("not archived: %s", error)
        damaged[entry["episode_id"]] = str(error)
        return True


def put_part(folder: ArchiveFolder, name: str, writer: PartWriter, damaged: Mapping[str, str]) -> int:
    """Write the file, unless it is empty, and beside it what had to be left out; the bytes of the file."""
    if damaged:
        # First: the file itself says that everything of its plan is written.
        lines = [json.dumps({"episode_id": episode, "reason": reason}) for episode, reason in damaged.items()]
        folder.put(name.removesuffix(PART_SUFFIX) + _QUARANTINE_SUFFIX, "".join(f"{line}\n" for line in lines).encode())
    if not writer.num_episodes:
        return 0
    data = writer.finish()
    folder.put(name, data)
    return data.size


def wanted_row_groups(
    folder: ArchiveFolder, where: EpisodeFilter, on_error: OnError
) -> Iterator[tuple[PartReader, int, Sequence[ArchivedEpisode]]]:
    """Each row group with wanted episodes: its file, its number, and those. Errors as ``read_archive``."""
    for name in folder.part_names():
        with skipping(on_error), PartReader(folder, name) as part:
            for group in range(part.num_row_groups):
                episodes: list[ArchivedEpisode] = []
                with skipping(on_error):
                    episodes = part.episodes(group, where)
                if episodes:
                    yield part, group, episodes


@contextlib.contextmanager
def skipping(on_error: OnError) -> Iterator[None]:
    """Log and leave the block at damage, or let the error through."""
    try:
        yield
    except IntegrityError as error:
        if on_error == "raise":
            raise
        _log.warning("skipped: %s", error)
