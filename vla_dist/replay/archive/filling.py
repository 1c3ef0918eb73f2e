"""What was recorded before, into the replay of a run: campaigns, imported data sets, earlier runs."""

from collections.abc import Sequence
from pathlib import Path

from vla_dist.core.errors import ReplayWait
from vla_dist.core.types import Metrics
from vla_dist.replay.archive.refill import RefillCounts, refill
from vla_dist.replay.shards import ShardedReplayTable
from vla_dist.replay.table import RedisReplayTable


class ArchivedEpisodes:
    """A core Worker: one step fills the table from the next archive, as far as the limiter lets it; then it idles.

    One that was killed and started again finds in the table what it had put there. Owns ``table``.

    Args:
        archives: folders or URIs, as ``ArchiveFolder.at`` takes them.
        append_timeout_s: how long one append may wait for the limiter before the step ends; the next one goes on.
    """

    def __init__(
        self,
        table: RedisReplayTable | ShardedReplayTable,
        archives: Sequence[str | Path],
        *,
        append_timeout_s: float = 10.0,
    ) -> None:
        self._table = table
        self._archives = list(archives)
        self._append_timeout_s = append_timeout_s
        self._next = 0
        self._before = RefillCounts()
        self._running = RefillCounts()

    @property
    def is_done(self) -> bool:
        return self._next >= len(self._archives)

    def step(self) -> Metrics:
        """Raises Unreachable, and what is wrong with an archive: IntegrityError, NotFound, ContractMismatch."""
        waited = 0.0
        if not self.is_done:
            try:
                self._running = refill(
                    self._table,
                    self._archives[self._next],
                    timeout_s=self._append_timeout_s,
                    on_counts=self._note,
                )
                self._next += 1
            except ReplayWait:
                waited = 1.0
            self._before, self._running = _sum(self._before, self._running), RefillCounts()
        return {
            "steps": float(self._before.steps),
            "episodes": float(self._before.inserted),
            "left_out": float(self._before.left_out),
            "waited": waited,
            "done": float(self.is_done),
        }

    def close(self) -> None:
        self._table.close()

    def _note(self, counts: RefillCounts) -> None:
        self._running = counts


def _sum(first: RefillCounts, second: RefillCounts) -> RefillCounts:
    """Duplicates are left out: they were counted when they were new."""
    return RefillCounts(
        inserted=first.inserted + second.inserted,
        left_out=first.left_out + second.left_out,
        steps=first.steps + second.steps,
    )
