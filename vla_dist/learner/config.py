"""What decides a training run, and a learner's place in it."""

from collections.abc import Callable
from dataclasses import dataclass, field

from vla_dist.core.errors import ConfigError
from vla_dist.learner.algorithms.interventions import InterventionWeights
from vla_dist.learner.parallel import OneRank, Parallel
from vla_dist.learner.statistics import ScalesFrom
from vla_dist.learner.train_step import OptimiserConfig
from vla_dist.models.conditioning import ConditioningKind


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerConfig:
    """One training run."""

    policy_name: str
    """Name in the registry."""
    run_id: str
    """Names this training run for ever; a resumed run keeps it, and so publishes no milestone twice."""
    optimiser: OptimiserConfig
    batch_size: int = 64
    """Windows an update, of each rank."""
    updates_per_step: int = 50
    """Updates in one ``step()``."""
    publish_updates: tuple[int, ...] = ()
    """Counts at which a version is published; 0 publishes the untrained policy; the last update always does."""
    channel: str | None = "stable"
    """Pointed at each new version; None: only publish."""
    checkpoint_every: int = 500
    """Updates between checkpoints; the last update always makes one."""
    algorithm: str = ""
    """By name; empty: that which the model and its conditioning are made for."""
    algorithm_changes: tuple[str, ...] = ()
    """``name=value`` of its settings."""
    interventions: InterventionWeights | None = None
    """None: a step counts the same whoever acted."""
    conditioning: ConditioningKind = "none"
    target_quantile: float = 0.9
    """How good an episode, among those in the replay, the policy is asked for: 1 is the best."""
    min_episodes: int = 1
    """Complete episodes to wait for before the first update."""
    statistics_episodes: int = 1000
    """Episodes that the normaliser is computed from, at most."""
    scales_from: ScalesFrom = "all"
    """Whose proprio the normaliser is computed from; of successes where there is one."""
    start_timeout_s: float = 300.0
    """Longest wait for ``min_episodes``."""
    sample_timeout_s: float = 30.0
    """Longest wait for one batch."""
    num_prefetch: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "updates_per_step", "checkpoint_every", "min_episodes", "statistics_episodes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"learner {name} {getattr(self, name)} must be at least 1")
        if self.batch_size < self.optimiser.num_micro_batches:
            raise ConfigError(
                f"batch_size {self.batch_size} of each rank cannot be cut into {self.optimiser.num_micro_batches} "
                "micro-batches; raise the one or lower the other"
            )
        outside = [u for u in self.publish_updates if not 0 <= u <= self.total_updates]
        if outside:
            raise ConfigError(f"publish_updates {outside} must be within 0..{self.total_updates}, the total")
        if not self.policy_name or not self.run_id:
            raise ConfigError("a learner needs a policy_name and a run_id")

    @property
    def total_updates(self) -> int:
        return self.optimiser.total_updates

    @property
    def milestones(self) -> tuple[int, ...]:
        return tuple(sorted({*self.publish_updates, self.total_updates}))

    def next_stop(self, updates: int) -> int:
        """Where a ``step()`` that starts after ``updates`` ends: the next unit, milestone or checkpoint."""
        unit = (updates // self.updates_per_step + 1) * self.updates_per_step
        checkpoint = (updates // self.checkpoint_every + 1) * self.checkpoint_every
        return min([unit, checkpoint, *(m for m in self.milestones if m > updates)])

    def is_checkpoint(self, updates: int) -> bool:
        return updates == self.total_updates or (updates > 0 and updates % self.checkpoint_every == 0)


def _unchanged(value: str) -> str:
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """One learner's place among those that train the same model together."""

    index: int = 0
    """Rank 0 publishes, and its data statistics hold for all."""
    first_update: int = 0
    """Where the checkpoint that it goes on from ends, so that a rank started again does not repeat its draws."""
    device: str = "cpu"
    parallel: Parallel = field(default_factory=OneRank)
    """How the ranks train one model."""
    share: Callable[[str], str] = _unchanged
    """Gives every rank rank 0's text."""
