"""A one-off copy of a buffer, in the format of an archive."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from vla_dist.replay.archive.folder import ArchiveFolder
from vla_dist.replay.archive.parquet import EVERYTHING, EpisodeFilter
from vla_dist.replay.archive.parts import add_episode, incarnation_of, new_part, open_for_writing, part_name, put_part
from vla_dist.replay.episodes import Entry
from vla_dist.replay.shards import ShardedReplayTable
from vla_dist.replay.table import RedisReplayTable

_PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportCounts:
    """What ``export_episodes`` did; episodes."""

    written: int = 0
    already_there: int = 0
    quarantined: int = 0
    steps: int = 0
    """Of those written."""
    parts: int = 0
    """Files written."""


def export_episodes(
    table: RedisReplayTable | ShardedReplayTable,
    uri: str | Path | ArchiveFolder,
    *,
    where: EpisodeFilter = EVERYTHING,
    limit: int | None = None,
    episodes_per_part: int = 256,
    bytes_per_part: int = 64 << 20,
    on_counts: Callable[[ExportCounts], None] = lambda _: None,
) -> ExportCounts:
    """Write the complete episodes that a buffer holds now, as an archive does; what the folder holds is left out.

    Needs no archiver, and nothing waits for it: an episode that is evicted meanwhile is not exported.

    Args:
        table: of the buffer.
        uri: see ``ArchiveFolder.at``. Made where it is missing.
        where: which episodes.
        limit: most to write, the oldest first; None: all.
        episodes_per_part: most episodes of a file.
        bytes_per_part: most bytes of a file, and the last episode.
        on_counts: told of the counts so far after each file.

    Raises:
        ContractMismatch, ConfigError: the folder holds episodes of another contract, or T.
        Unreachable: the buffer or the folder does not answer; what was written stays.
    """
    folder = ArchiveFolder.at(uri)
    known = open_for_writing(folder, table)
    counts = ExportCounts()
    for shard in table.shards if isinstance(table, ShardedReplayTable) else (table,):
        incarnation = incarnation_of(shard)
        wanted = (entry for entry in shard.reader.entries(timeout_s=_PATIENCE_S) if _is_wanted(entry, where))
        while limit is None or counts.written < limit:
            most = episodes_per_part if limit is None else min(episodes_per_part, limit - counts.written)
            writer, damaged = new_part(shard), dict[str, str]()
            first: Entry | None = None
            already_there = 0
            for entry in wanted:
                if entry in known:
                    already_there += 1
                    continue
                first = first or entry
                add_episode(shard, writer, entry, damaged)
                if writer.num_episodes >= most or writer.num_bytes >= bytes_per_part:
                    break
            counts = replace(counts, already_there=counts.already_there + already_there)
            if first is None:
                break
            is_written = put_part(folder, part_name(incarnation, first), writer, damaged) > 0
            counts = replace(
                counts,
                written=counts.written + writer.num_episodes,
                steps=counts.steps + writer.num_steps,
                quarantined=counts.quarantined + len(damaged),
                parts=counts.parts + is_written,
            )
            on_counts(counts)
    return counts


def _is_wanted(entry: Entry, where: EpisodeFilter) -> bool:
    return where.accepts(
        task=entry["task"],
        source=entry["source"],
        success=entry["success"],
        policy_versions=entry["policy_versions"],
    )
