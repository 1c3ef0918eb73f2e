"""What a person sees of a run while it goes on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vla_dist.evaluation.statistics import SuccessRate


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """One moment of a run."""

    preset: str
    run_dir: Path
    phase: str = "starting"
    elapsed_s: float = 0.0
    memory_mb: float = 0.0
    """Of all processes of the run, shared pages counted once."""
    rollout_episodes: int = 0
    rollout_episodes_wanted: int = 0
    collect_steps_per_s: float = 0.0
    steps_stored: int = 0
    episodes_stored: int = 0
    steps_by_source: Mapping[str, int] = field(default_factory=dict)
    samples_per_insert: float = 0.0
    replay_mb: float = 0.0
    updates: int = 0
    total_updates: int = 0
    loss: float = float("nan")
    data_wait_share: float = 0.0
    newest_version: int = 0
    published: Mapping[int, int] = field(default_factory=dict)
    """version -> learner updates."""
    rate_by_version: Mapping[int, SuccessRate] = field(default_factory=dict)
    robots_running: int = 0
    served_calls: int = 0
    served_calls_failed: int = 0
    call_p50_ms: float = 0.0
    call_p99_ms: float = 0.0
    served_version: int = 0
    fleet_episodes: int = 0
    notes: tuple[str, ...] = ()
    """Restarts and the like, oldest first."""

    @property
    def success_by_version(self) -> dict[int, float]:
        return {version: rate.mean for version, rate in self.rate_by_version.items()}
