"""What a policy is asked to achieve: the number in the return token, in training and while acting."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np

from vla_dist.core.errors import ConfigError
from vla_dist.core.types import Array, Batch

ConditioningKind = Literal["none", "steps_to_success", "reward", "success", "advantage", "reward_advantage"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReturnConditioning:
    """How returns-to-go are made from episodes, and how they move while acting.

    * ``steps_to_success``: minus the steps left until success; minus ``max_episode_steps`` all through a failure.
      Acting counts up by one a step from ``target`` and stops at ``ceiling``. Dense rewards make the slowest success
      look best; this makes the fastest one best.
    * ``reward``: the sum of raw rewards to come. Acting subtracts the rewards that the robot reports.
    * ``success``: 1 all through an episode that succeeded, else 0. Acting asks for 1.
    * ``advantage``, ``reward_advantage``: the learner replaces the values of ``steps_to_success`` or ``reward`` by how
      much better than expected a step turned out, from -1 to 1. Acting asks for 1 after scaling.
    * ``none``: zero.
    """

    kind: ConditioningKind = "none"
    scale: float = 1.0
    """Values are divided by this before the model sees them; about the largest absolute value in the data."""
    target: float = 0.0
    """Unscaled value asked for at the first step, for example -60: succeed in 60 steps."""
    targets: Mapping[str, float] = field(default_factory=dict[str, float])
    """instruction -> its own target; other words take ``target``, or that of the nearest ones where a policy can tell.
    """
    ceiling: float = -1.0
    """``steps_to_success`` counts up to this unscaled value and no further."""
    exploration_targets: Mapping[str, float] = field(default_factory=dict[str, float])
    """instruction -> what a rollout that explores asks for in place of ``targets``; "" for other words."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(ConditioningKind):
            raise ConfigError(f"conditioning {self.kind!r} must be one of {', '.join(get_args(ConditioningKind))}")
        highest = max([self.target, *self.targets.values()])
        numbers = [self.scale, self.target, self.ceiling, *self.targets.values(), *self.exploration_targets.values()]
        if not (np.isfinite(numbers).all() and self.scale > 0):
            raise ConfigError(f"conditioning scale {self.scale} must be positive, target {self.target} finite")
        if self.kind == "steps_to_success" and not (highest < 0 and self.ceiling < 0):
            raise ConfigError(
                f"steps_to_success counts steps as negative numbers: target {highest} and ceiling "
                f"{self.ceiling} must be below 0"
            )

    @property
    def is_relative(self) -> bool:
        """Whether the learner replaces ``training_values`` before the model sees them."""
        return self.kind in ("advantage", "reward_advantage")

    def training_values(self, batch: Batch, *, max_episode_steps: int) -> Array:
        """(B, K) float32, scaled; padded steps are not meaningful."""
        if self.kind == "none":
            return np.zeros(batch.timesteps.shape, np.float32)
        if self.kind == "success":
            return np.broadcast_to(batch.success[:, None], batch.timesteps.shape).astype(np.float32) / self.scale
        if self.kind in ("reward", "reward_advantage"):
            return (batch.returns_to_go / self.scale).astype(np.float32)
        left = (batch.episode_lengths[:, None] - batch.timesteps).astype(np.float32)
        return -np.where(batch.success[:, None], left, np.float32(max_episode_steps)) / np.float32(self.scale)

    def first(self, timestep: int, *, instruction: str = "") -> float:
        """Unscaled value for the step ``timestep`` of an episode whose earlier steps are not remembered."""
        target = self.targets.get(instruction, self.target)
        if self.kind == "steps_to_success":
            return min(target + timestep, self.ceiling)
        return 0.0 if self.kind == "none" else target

    def after(self, value: float, reward: float) -> float:
        """Unscaled value one step later, given the raw reward of the step in between."""
        if self.kind == "steps_to_success":
            return min(value + 1.0, self.ceiling)
        if self.kind == "reward":
            return value - reward
        return 0.0 if self.kind == "none" else value

    def exploring(self) -> "ReturnConditioning":
        """What rollouts for learning ask for; the same where nothing else is known."""
        if not self.exploration_targets:
            return self
        other = self.exploration_targets.get("", self.target)
        return replace(self, target=other, targets={**self.targets, **_named(self.exploration_targets)})


def _named(targets: Mapping[str, float]) -> dict[str, float]:
    return {words: value for words, value in targets.items() if words}
