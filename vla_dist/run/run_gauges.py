"""A run's status as Prometheus gauges, on the metrics port of the driver's node."""

from ray.util.metrics import Gauge

from vla_dist.run.status import RunStatus

_PREFIX = "vla_dist_run_"
_EXPORTED = {
    "elapsed_s": "Seconds since the run began.",
    "memory_mb": "Of the driver and its descendants.",
    "rollout_episodes": "By rollout workers.",
    "collect_steps_per_s": "Inserted into the replay by all writers.",
    "steps_stored": "In the replay.",
    "episodes_stored": "In the replay.",
    "samples_per_insert": "Windows sampled for each inserted step.",
    "replay_mb": "Bytes of the replay / 2^20.",
    "updates": "Of the learner.",
    "total_updates": "That the learner shall make.",
    "data_wait_share": "Part of its time that the learner waits for data.",
    "newest_version": "Published.",
    "served_version": "Newest that a simulated robot was served.",
    "robots_running": "Simulated robots of the run.",
    "served_calls": "To them, since the run began.",
    "served_calls_failed": "Of those.",
    "call_p50_ms": "Of those.",
    "call_p99_ms": "Of those.",
    "fleet_episodes": "Of them.",
}
METRICS = (*(f"{_PREFIX}{name}" for name in _EXPORTED), f"{_PREFIX}notes", f"{_PREFIX}success")


class RunGauges:
    """One label, ``run``; ``success`` has the version as well."""

    def __init__(self, run_id: str) -> None:
        self._tags = {"run": run_id}
        self._gauges = {
            name: Gauge(f"{_PREFIX}{name}", description=text, tag_keys=("run",)) for name, text in _EXPORTED.items()
        }
        self._notes = Gauge(f"{_PREFIX}notes", description="Deaths and other incidents so far.", tag_keys=("run",))
        self._success = Gauge(f"{_PREFIX}success", description="Success on unseen seeds.", tag_keys=("run", "version"))

    def show(self, status: RunStatus) -> None:
        for name, gauge in self._gauges.items():
            gauge.set(float(getattr(status, name)), tags=self._tags)
        self._notes.set(float(len(status.notes)), tags=self._tags)
        for version, rate in status.success_by_version.items():
            self._success.set(rate, tags={**self._tags, "version": str(version)})
