"""The archive: every complete episode once in Parquet files, from which a buffer can be refilled.

The archiver:
consumes: complete episodes of a buffer. waits for: a part to be due. unblocked by: completions and time.

Exactly once, whatever dies when: a plan (name of the file, its episodes) is stored in Redis before the file is written
and removed when it is finished. Who finds a plan executes that one, also where several archivers are at work, and an
episode that a file of the archive holds already is never planned: not after a refill, nor after Redis lost its last
second. An episode may be evicted once the plan that holds it is finished.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from vla_dist.core.errors import ConfigError, IntegrityError, NotFound, ReplayWait
from vla_dist.core.types import Metrics, Segment
from vla_dist.replay.archive.folder import ArchiveFolder
from vla_dist.replay.archive.parquet import EVERYTHING, EpisodeFilter, PartWriter
from vla_dist.replay.archive.part_reader import PartReader
from vla_dist.replay.archive.parts import (
    OnError,
    add_episode,
    incarnation_of,
    new_part,
    open_for_writing,
    part_name,
    put_part,
    skipping,
    wanted_row_groups,
)
from vla_dist.replay.archive.plan import ArchivePlan, PartSize
from vla_dist.replay.episodes import Entry
from vla_dist.replay.link import Deadline
from vla_dist.replay.state import BufferState
from vla_dist.replay.table import RedisReplayTable

_PATIENCE_S = 10.0
_POLL_S = 0.25
_NEXT = 16
"""Episodes at the head of the order of eviction that are looked at; some of them may have left."""
_COUNTS = ("episodes", "parts", "bytes", "duplicates", "missing", "quarantined")


class Archiver:
    """Writes the complete episodes of one buffer to one folder; a ``core.protocols.Worker``.

    From its construction on, eviction waits for the archive. Any number of them may be at work on a buffer and any of
    them may die at any moment. A buffer has one archive; several buffers (shards) may share a folder. Not safe for
    several threads.
    """

    def __init__(
        self,
        table: RedisReplayTable,
        uri: str | Path | ArchiveFolder,
        *,
        episodes_per_part: int = 256,
        bytes_per_part: int = 64 << 20,
        flush_after_s: float = 30.0,
    ) -> None:
        """
        Args:
            table: of the buffer; any of its tables.
            uri: a path, or a URI for ``pyarrow.fs``: see ``ArchiveFolder.at``. Made where it is missing.
            episodes_per_part: most episodes of a file.
            bytes_per_part: a file is full with the episode that reaches this, before compression.
            flush_after_s: an episode waits no longer than this for others to share its file, and not at all once the
                buffer is half full and it is among the next to be evicted.

        Raises:
            ConfigError: settings that cannot work, or a folder with episodes of another T.
            ContractMismatch: a folder with episodes of another contract.
            Unreachable: the buffer or the folder does not answer.
        """
        if episodes_per_part < 1 or bytes_per_part < 1 or flush_after_s < 0:
            raise ConfigError(
                f"episodes_per_part {episodes_per_part} and bytes_per_part {bytes_per_part} must be at least 1, "
                f"flush_after_s {flush_after_s} must not be negative"
            )
        self._table = table
        self._folder = ArchiveFolder.at(uri)
        self._size = PartSize(table, max_episodes=episodes_per_part, max_bytes=bytes_per_part)
        self._flush_after_s = flush_after_s
        self._known = open_for_writing(self._folder, table)
        self._behind = 0
        self._counts: dict[str, float] = dict.fromkeys(_COUNTS, 0.0)
        table.link.call([table.function("archiving", 1)], timeout_s=_PATIENCE_S)

    def step(self, *, timeout_s: float = 1.0) -> Metrics:
        """Write one file, or return when none was due within ``timeout_s``.

        Returns:
            Of this archiver since its construction: ``episodes``, ``parts`` and ``bytes`` written, ``duplicates`` that
            the archive had, ``missing`` ones that were discarded before they were archived, ``quarantined`` damaged
            ones (named in a ``.quarantine.jsonl`` file of the archive); and ``behind``, complete episodes that are not
            archived yet.

        Raises:
            Unreachable: the buffer or the folder does not answer; call again, nothing is lost or repeated.
        """
        end = time.monotonic() + timeout_s
        while not self._advance(is_forced=False):
            left_s = end - time.monotonic()
            if left_s <= 0:
                break
            time.sleep(min(_POLL_S, left_s))
        return {**self._counts, "behind": float(self._behind)}

    def flush(self, *, timeout_s: float) -> None:
        """Archive every episode that is complete now, however few they are.

        Raises:
            ReplayWait: ``timeout_s`` were not enough; call again.
            Unreachable: as ``step``.
        """
        deadline = Deadline(timeout_s)
        until = self._table.state().completions
        while True:
            archived = self._table.state().archived
            if archived >= until:
                return
            # Another archiver may be at the same file: nothing to do here, and not done yet.
            is_late = deadline.left_s <= 0 if self._advance(is_forced=True) else not deadline.pause()
            if is_late and self._table.state().archived < until:
                raise ReplayWait(
                    f"{until - archived} of {until} episodes were not archived in {self._folder.name!r} within "
                    f"{timeout_s} s; call flush again"
                )

    def count_episodes(self) -> int:
        """Those that the archive holds now, of whichever buffer. Raises Unreachable."""
        self._known.learn()
        return len(self._known)

    def release(self) -> None:
        """Let eviction go on without the archive: for a buffer that nobody archives any more."""
        self._table.link.call([self._table.function("archiving", 0)], timeout_s=_PATIENCE_S)

    def close(self) -> None:
        """Close the table's connections. Eviction goes on waiting for the archive: another archiver may take over."""
        self._table.close()

    def _advance(self, *, is_forced: bool) -> bool:
        """One plan, where one is due or somebody left one; whether there was."""
        keys = self._table.keys
        packed, pending, clock = self._table.link.call(
            [("GET", keys.state), ("GET", keys.archive_plan), ("TIME",)], timeout_s=_PATIENCE_S
        )
        state = BufferState.unpack(packed, self._table.config.name)
        if not state.archiving:
            # The buffer was created anew, or an earlier archiver released it.
            self._table.link.call([self._table.function("archiving", 1)], timeout_s=_PATIENCE_S)
        self._behind = state.completions - state.archived
        if pending is None:
            now_s = float(clock[0]) + float(clock[1]) / 1e6
            pending = self._propose(state, now_s, is_forced=is_forced) if self._behind else None
        if pending is None:
            return False
        self._execute(state.archived, pending)
        return True

    def _propose(self, state: BufferState, now_s: float, *, is_forced: bool) -> bytes | None:
        """The plan that holds now, this one or another's; None where none is due."""
        reader = self._table.reader
        entries = reader.entries(after=state.archived, timeout_s=_PATIENCE_S)
        waiting = list(itertools.islice(entries, self._size.max_episodes))
        chosen, is_full = self._size.fill(waiting)
        is_old = bool(waiting) and now_s - waiting[0]["completed_at_s"] >= self._flush_after_s
        if waiting and not (is_forced or is_full or is_old or self._holds_eviction_up(state, waiting)):
            return None
        self._known.learn()
        wanted = [entry for entry in chosen if entry not in self._known]
        # Where nothing waits, all that the state counted has left meanwhile.
        plan = ArchivePlan(
            file=part_name(incarnation_of(self._table), wanted[0]) if wanted else "",
            completions=tuple(entry["completion"] for entry in wanted),
            duplicates=len(chosen) - len(wanted),
            reached=chosen[-1]["completion"] if chosen else state.completions,
        )
        call = self._table.function("plan_archive", state.archived, plan.to_json())
        answer, holding = self._table.link.call([call], timeout_s=_PATIENCE_S)[0]
        if answer == b"STALE":
            return None
        return holding

    def _holds_eviction_up(self, state: BufferState, waiting: Sequence[Entry]) -> bool:
        """Whether one of those that are to be evicted next waits for the archive, and room is getting short."""
        if 2 * state.steps < self._table.config.capacity_steps:
            return False
        (names,) = self._table.link.call([("LRANGE", self._table.keys.order, 0, _NEXT - 1)], timeout_s=_PATIENCE_S)
        return not {name.decode() for name in names}.isdisjoint(entry["episode_id"] for entry in waiting)

    def _execute(self, archived: int, holding: bytes) -> None:
        plan = ArchivePlan.from_json(holding)
        done: dict[str, float] = {"duplicates": plan.duplicates}
        if plan.file and not self._is_written(plan.file):
            writer, damaged, missing = self._build(archived, plan)
            if missing and self._table.state().archived != archived:
                # Evicted, so another archiver has finished this plan meanwhile: its file is the whole one.
                return
            num_bytes = put_part(self._folder, plan.file, writer, damaged)
            done |= {"episodes": writer.num_episodes, "parts": num_bytes > 0, "bytes": num_bytes}
            done |= {"missing": missing, "quarantined": len(damaged)}
        finish = self._table.function("finish_archive", archived, plan.reached, holding)
        if self._table.link.call([finish], timeout_s=_PATIENCE_S)[0] == 1:
            self._behind -= plan.reached - archived
            for name, value in done.items():
                self._counts[name] += value

    def _is_written(self, file: str) -> bool:
        """Whether an earlier life came as far as the file: what it holds may have left the buffer since."""
        if not self._folder.has(file):
            return False
        try:
            with PartReader(self._folder, file):
                return True
        except (IntegrityError, NotFound):
            return False

    def _build(self, archived: int, plan: ArchivePlan) -> tuple[PartWriter, dict[str, str], int]:
        """The file, the reason for each damaged episode, and the number of those that are not there."""
        wanted = set(plan.completions)
        writer, damaged = new_part(self._table), dict[str, str]()
        for entry in self._table.reader.entries(after=archived, timeout_s=_PATIENCE_S):
            if entry["completion"] > plan.reached:
                break
            if entry["completion"] in wanted and add_episode(self._table, writer, entry, damaged):
                wanted.discard(entry["completion"])
        return writer, damaged, len(wanted)


def read_archive(
    uri: str | Path | ArchiveFolder, *, where: EpisodeFilter = EVERYTHING, on_error: OnError = "raise"
) -> Iterator[list[Segment]]:
    """Episodes of an archive, each as its segments in order, bit for bit as they were stored.

    In the order they became whole; where several buffers share the archive, one buffer after the other. Memory holds
    one row group of a file: some 16 MB, or one episode where that is more.

    Args:
        uri: see ``ArchiveFolder.at``.
        where: which ones.
        on_error: see ``OnError``.

    Raises:
        IntegrityError: a damaged or foreign file, named, unless ``on_error`` says to skip it.
        NotFound: no such folder.
        Unreachable: no answer.
    """
    for part, group, episodes in wanted_row_groups(ArchiveFolder.at(uri), where, on_error):
        with skipping(on_error):
            yield from part.read(group, episodes)
