"""The numbers of a running system, read from where they already are: the table, the registry and the board."""

import contextlib
import time
from collections.abc import Mapping

from vla_dist.core.errors import Unreachable
from vla_dist.core.protocols import PolicyRegistry, ReplayTable
from vla_dist.core.types import TableStats
from vla_dist.evaluation.statistics import SuccessRate
from vla_dist.robot.latency import LatencyHistogram
from vla_dist.run.board import BoardLink
from vla_dist.run.composition.place import Place
from vla_dist.run.status import RunStatus

_STATS_EVERY_S = 1.0


class Telemetry:
    """Reads, never steers."""

    def __init__(self, place: Place, table: ReplayTable, registry: PolicyRegistry, board: BoardLink) -> None:
        self._place = place
        self._registry = registry
        self._board = board
        self._table = table
        self._published: dict[int, int] = {}
        self._stats: TableStats | None = None
        self._stats_at = float("-inf")
        self._rate = (0.0, 0.0, 0.0)
        """(time, steps inserted, steps per second) at the last reading."""

    def published(self) -> dict[int, int]:
        """version -> learner updates, of this run; as it was last known while the registry is away."""
        with contextlib.suppress(Unreachable):
            manifests = self._registry.manifests(self._place.config.preset)
            self._published = {m.version: int(m.metrics.get("updates", 0)) for m in manifests}
        return self._published

    @property
    def steps_collected(self) -> int:
        return self._read_table().steps_inserted

    def fleet(self) -> dict[str, float]:
        """Totals over all robots."""
        robots = _under("fleet/", self._board.read())
        names = ("episodes", "successes", "steps", "lost_episodes", "fallbacks", "calls", "failed_calls", "reconnects")
        return {"robots": float(len(robots)), **{n: sum(r.get(n, 0.0) for r in robots.values()) for n in names}}

    def status(
        self,
        *,
        phase: str,
        elapsed_s: float,
        memory_mb: float,
        rates: Mapping[int, SuccessRate],
        notes: tuple[str, ...],
    ) -> RunStatus:
        config, board, stats = self._place.config, self._board.read(), self._read_table()
        published = self.published()
        learner = board.get("learner", {})
        robots = _under("fleet/", board)
        latency = LatencyHistogram.merged(robots.values())
        rollouts = _under("rollout-", board)
        fleet = self.fleet()
        return RunStatus(
            preset=config.preset,
            run_dir=self._place.run_dir,
            phase=phase,
            elapsed_s=elapsed_s,
            memory_mb=memory_mb,
            rollout_episodes=int(sum(r.get("finished", 0.0) for r in rollouts.values())),
            rollout_episodes_wanted=config.rollout.total_episodes_per_task * len(config.env.tasks),
            collect_steps_per_s=self._rate[2],
            steps_stored=stats.num_steps,
            episodes_stored=stats.num_episodes,
            steps_by_source=stats.steps_by_source,
            samples_per_insert=stats.samples_per_insert,
            replay_mb=stats.num_bytes / 2**20,
            updates=int(learner.get("updates", 0)),
            total_updates=config.learner.total_updates,
            loss=learner.get("loss", float("nan")),
            data_wait_share=learner.get("data_wait_share", 0.0),
            newest_version=max(published, default=0),
            published=published,
            rate_by_version=rates,
            robots_running=len(robots),
            served_calls=int(fleet["calls"]),
            served_calls_failed=int(fleet["failed_calls"]),
            call_p50_ms=1000 * latency.percentile(50),
            call_p99_ms=1000 * latency.percentile(99),
            served_version=int(max((r.get("policy_version", 0.0) for r in robots.values()), default=0.0)),
            fleet_episodes=int(fleet["episodes"]),
            notes=notes,
        )

    def _read_table(self) -> TableStats:
        now = time.monotonic()
        if self._stats is None or now - self._stats_at > _STATS_EVERY_S:
            try:
                stats = self._table.stats()
            except Unreachable:
                if self._stats is None:
                    raise
                return self._stats
            before_s, before_steps, _ = self._rate
            per_s = (stats.steps_inserted - before_steps) / max(now - before_s, 1e-9) if self._stats else 0.0
            self._rate = (now, stats.steps_inserted, per_s)
            self._stats, self._stats_at = stats, now
        return self._stats


def _under(prefix: str, board: Mapping[str, Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
    return {name: metrics for name, metrics in board.items() if name.startswith(prefix)}
