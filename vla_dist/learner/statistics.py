"""What a learner must know about the data before its first update: scales, lengths, returns and words."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.core.types import Segment
from vla_dist.data.normalisation import RunningMoments
from vla_dist.models.conditioning import ConditioningKind, ReturnConditioning

_STD_FLOOR = 1e-3
"""A millimetre or a milliradian: what moves less is noise, what moves more tells scenes apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayStatistics:
    """Of complete episodes; plain numbers, so that one rank can tell the others."""

    num_steps: int
    proprio_mean: tuple[float, ...]
    """(P,) raw units."""
    proprio_std: tuple[float, ...]
    """(P,) raw units; 1 for a dimension that hardly moves."""
    success_lengths: tuple[int, ...]
    """Steps of each successful episode."""
    episode_returns: tuple[float, ...]
    """Sum of raw rewards of each episode."""
    instructions: tuple[str, ...]
    """Distinct, in order of appearance."""

    @classmethod
    def of(cls, episodes: Iterable[list[Segment]]) -> "ReplayStatistics":
        """One pass, padding left out.

        Raises:
            DataError: no episode, or proprio that is not finite.
        """
        moments: RunningMoments | None = None
        lengths: list[int] = []
        returns: list[float] = []
        instructions: dict[str, None] = {}
        for episode in episodes:
            rows = np.concatenate([segment.proprio[: segment.length] for segment in episode])
            try:
                moments = (moments or RunningMoments.empty(rows.shape[1])).update(rows)
            except DataError as error:
                raise DataError(f"proprio of episode {episode[0].episode_id!r}: {error}") from error
            returns.append(float(sum(s.rewards[: s.length].sum(dtype=np.float64) for s in episode)))
            if episode[-1].success:
                lengths.append(len(rows))
            instructions[episode[0].instruction] = None
        if moments is None:
            raise DataError("no complete episode to take statistics from; wait for the first ones")
        return cls(
            num_steps=moments.count,
            proprio_mean=tuple(moments.mean.tolist()),
            proprio_std=tuple(moments.std(floor=_STD_FLOOR).tolist()),
            success_lengths=tuple(lengths),
            episode_returns=tuple(returns),
            instructions=tuple(instructions),
        )

    def conditioning(self, kind: ConditioningKind, *, quantile: float, max_episode_steps: int) -> ReturnConditioning:
        """What a policy trained on these episodes is asked for: the ``quantile`` best of what they reached."""
        if not 0.0 <= quantile <= 1.0:
            raise ConfigError(f"target quantile {quantile} must be within 0..1")
        if kind == "steps_to_success":
            steps = np.quantile(self.success_lengths, 1.0 - quantile) if self.success_lengths else max_episode_steps
            return ReturnConditioning(kind=kind, scale=float(max_episode_steps), target=-float(max(1.0, steps)))
        if kind == "reward":
            scale = float(np.abs(self.episode_returns).max()) or 1.0
            return ReturnConditioning(kind=kind, scale=scale, target=float(np.quantile(self.episode_returns, quantile)))
        return ReturnConditioning(kind=kind)

    def to_json(self) -> dict[str, Any]:
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "ReplayStatistics":
        """Inverse of ``to_json``."""
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
        return cls(**values)
