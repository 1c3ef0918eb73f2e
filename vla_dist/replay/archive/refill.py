"""Filling a buffer from an archive."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vla_dist.replay.archive.folder import ArchiveFolder
from vla_dist.replay.archive.parquet import EVERYTHING, EpisodeFilter
from vla_dist.replay.archive.part_reader import ArchivedEpisode, PackedEpisode
from vla_dist.replay.archive.parts import OnError, require_same_contract, skipping, wanted_row_groups
from vla_dist.replay.shards import ShardedReplayTable, shard_of
from vla_dist.replay.table import RedisReplayTable

_SEGMENTS_PER_APPEND = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RefillCounts:
    """What ``refill`` did; episodes."""

    inserted: int = 0
    duplicates: int = 0
    """The buffer knew them already."""
    left_out: int = 0
    """Older than what fitted the buffer or the limit."""
    steps: int = 0
    """Of those inserted."""


def refill(
    table: RedisReplayTable | ShardedReplayTable,
    uri: str | Path | ArchiveFolder,
    *,
    where: EpisodeFilter = EVERYTHING,
    limit: int | None = None,
    timeout_s: float,
    on_error: OnError = "raise",
    on_counts: Callable[[RefillCounts], None] = lambda _: None,
) -> RefillCounts:
    """Append what a buffer lacks of an archive, in the order of the archive.

    Of more than fits beside what the buffer holds now, the newest: nothing is evicted for it. Episodes that the buffer
    remembers, evicted ones too, are duplicates. Frames that are packed as the buffer packs them are stored as they are.
    What comes from the archive of this buffer is not archived again.

    Args:
        table: of the buffer.
        uri: see ``ArchiveFolder.at``.
        where: which episodes.
        limit: most to insert, the newest; None: all that fit.
        timeout_s: how long one append, of some 64 segments, may wait for a limiter.
        on_error: see ``OnError``.
        on_counts: told of the counts so far after each row group.

    Raises:
        ContractMismatch: episodes of another contract; the message lists every difference.
        ConfigError: episodes of another T.
        ReplayWait: a limiter or a full server refused; call again, what was inserted is a duplicate then.
        IntegrityError, NotFound, Unreachable: as ``read_archive``.
    """
    folder = ArchiveFolder.at(uri)
    shards = table.shards if isinstance(table, ShardedReplayTable) else (table,)
    missing = _Missing()
    duplicates = 0
    for part, group, episodes in wanted_row_groups(folder, where, on_error):
        require_same_contract(table, part.header, folder.name)
        known = _known(shards, episodes, timeout_s)
        duplicates += sum(known)
        for episode, is_known in zip(episodes, known, strict=True):
            if not is_known:
                missing.add(
                    (part.file_name, group, episode.first_row), episode, shard_of(episode.episode_id, len(shards))
                )
    chosen = missing.newest([shard.config.capacity_steps - shard.state().steps for shard in shards], limit)
    counts = RefillCounts(duplicates=duplicates, left_out=missing.count - len(chosen))
    groups = {(name, group) for name, group, _ in chosen}
    for part, group, episodes in wanted_row_groups(folder, where, on_error):
        if (part.file_name, group) in groups:
            wanted = [e for e in episodes if (part.file_name, group, e.first_row) in chosen]
            with skipping(on_error):
                for batch in _batches(part.read_packed(group, wanted, shards[0].codec)):
                    counts = _append(shards, batch, counts, timeout_s)
            on_counts(counts)
    return counts


_Place = tuple[str, int, int]
"""File, row group, first row."""


class _Missing:
    """Episodes of an archive that the buffer lacks."""

    def __init__(self) -> None:
        self._places: list[_Place] = []
        self._shards: list[int] = []
        self._lengths: list[int] = []
        self._times: list[float] = []

    @property
    def count(self) -> int:
        return len(self._places)

    def add(self, place: _Place, episode: ArchivedEpisode, shard: int) -> None:
        self._places.append(place)
        self._shards.append(shard)
        self._lengths.append(episode.length)
        self._times.append(episode.completed_at_s)

    def newest(self, room: Sequence[int], limit: int | None) -> set[_Place]:
        """At most ``limit``, of as many steps as there is ``room`` for on each shard."""
        left = list(room)
        chosen: set[_Place] = set()
        for at in np.argsort(np.array(self._times), kind="stable")[::-1].tolist():
            if limit is not None and len(chosen) >= limit:
                break
            shard = self._shards[at]
            left[shard] -= self._lengths[at]
            # Below 0 it stays there: nothing older slips in behind what did not fit.
            if left[shard] >= 0:
                chosen.add(self._places[at])
            else:
                left[shard] = -1
        return chosen


def _known(shards: Sequence[RedisReplayTable], episodes: Sequence[ArchivedEpisode], timeout_s: float) -> list[bool]:
    """Whether each was taken before."""
    asked: dict[int, list[int]] = {}
    for at, episode in enumerate(episodes):
        asked.setdefault(shard_of(episode.episode_id, len(shards)), []).append(at)
    known = [False] * len(episodes)
    for shard, positions in asked.items():
        calls = [shards[shard].function("has", episodes[at].episode_id) for at in positions]
        for at, answer in zip(positions, shards[shard].link.call(calls, timeout_s=timeout_s), strict=True):
            known[at] = bool(answer)
    return known


def _batches(episodes: Iterable[PackedEpisode]) -> Iterator[list[PackedEpisode]]:
    """Enough for one round trip: what is decoded at once must not grow with a row group."""
    batch: list[PackedEpisode] = []
    for episode in episodes:
        batch.append(episode)
        if sum(len(one.segments) for one in batch) >= _SEGMENTS_PER_APPEND:
            yield batch
            batch = []
    if batch:
        yield batch


def _append(
    shards: Sequence[RedisReplayTable], episodes: Sequence[PackedEpisode], counts: RefillCounts, timeout_s: float
) -> RefillCounts:
    for number, shard in enumerate(shards):
        mine = [one for one in episodes if shard_of(one.segments[0].episode_id, len(shards)) == number]
        segments = [segment for episode in mine for segment in episode.segments]
        frames = [packed for episode in mine for packed in episode.frames]
        results = iter(shard.append_all(segments, timeout_s=timeout_s, frames=frames))
        for episode in mine:
            if "inserted" in list(itertools.islice(results, len(episode.segments))):
                steps = counts.steps + sum(segment.length for segment in episode.segments)
                counts = replace(counts, inserted=counts.inserted + 1, steps=steps)
            else:
                counts = replace(counts, duplicates=counts.duplicates + 1)
    return counts
