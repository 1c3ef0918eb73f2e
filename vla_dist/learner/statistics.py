"""What a learner must know about the data before its first update: scales, lengths, returns and words."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.core.types import Segment
from vla_dist.data.normalisation import RunningMoments
from vla_dist.models.conditioning import ConditioningKind, ReturnConditioning

_STD_FLOOR = 1e-3
"""A millimetre or a milliradian: what moves less is noise, what moves more tells scenes apart."""


ScalesFrom = Literal["all", "successes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayStatistics:
    """Of complete episodes; plain numbers, so that one rank can tell the others."""

    num_steps: int
    proprio_mean: tuple[float, ...]
    """(P,) raw units."""
    proprio_std: tuple[float, ...]
    """(P,) raw units; 1 for a dimension that hardly moves."""
    success_lengths: Mapping[str, tuple[int, ...]]
    """task -> steps of each successful episode."""
    episode_returns: Mapping[str, tuple[float, ...]]
    """task -> sum of raw rewards of each episode."""
    instructions: Mapping[str, str]
    """Distinct instruction -> its task, in order of appearance."""

    @classmethod
    def of(cls, episodes: Iterable[list[Segment]], *, scales_from: ScalesFrom = "all") -> "ReplayStatistics":
        """One pass, padding left out.

        Args:
            scales_from: whose proprio makes mean and spread; where none succeeded, that of all.

        Raises:
            DataError: no episode, or proprio or rewards that are not finite.
        """
        moments: RunningMoments | None = None
        of_successes: RunningMoments | None = None
        lengths: dict[str, list[int]] = {}
        returns: dict[str, list[float]] = {}
        instructions: dict[str, str] = {}
        for episode in episodes:
            rows = np.concatenate([segment.proprio[: segment.length] for segment in episode])
            try:
                moments = (moments or RunningMoments.empty(rows.shape[1])).update(rows)
                if episode[-1].success:
                    of_successes = (of_successes or RunningMoments.empty(rows.shape[1])).update(rows)
            except DataError as error:
                raise DataError(f"proprio of episode {episode[0].episode_id!r}: {error}") from error
            task = episode[0].task
            total = float(sum(s.rewards[: s.length].sum(dtype=np.float64) for s in episode))
            if not np.isfinite(total):
                raise DataError(f"rewards of episode {episode[0].episode_id!r} sum to {total}; remove that episode")
            returns.setdefault(task, []).append(total)
            if episode[-1].success:
                lengths.setdefault(task, []).append(len(rows))
            instructions.setdefault(episode[0].instruction, task)
        if moments is None:
            raise DataError("no complete episode to take statistics from; wait for the first ones")
        scales = of_successes if scales_from == "successes" and of_successes is not None else moments
        return cls(
            num_steps=moments.count,
            proprio_mean=tuple(scales.mean.tolist()),
            proprio_std=tuple(scales.std(floor=_STD_FLOOR).tolist()),
            success_lengths={task: tuple(found) for task, found in lengths.items()},
            episode_returns={task: tuple(found) for task, found in returns.items()},
            instructions=instructions,
        )

    def conditioning(
        self,
        kind: ConditioningKind,
        *,
        quantile: float,
        max_episode_steps: int,
        phrases: Mapping[str, Sequence[str]] | None = None,
    ) -> ReturnConditioning:
        """What a policy trained on these episodes is asked for: the ``quantile`` best of what each task reached.

        Tasks differ in length: one target for all would ask the long ones for what no episode ever showed.

        Args:
            phrases: task -> further wordings of it.
        """
        if not 0.0 <= quantile <= 1.0:
            raise ConfigError(f"target quantile {quantile} must be within 0..1")
        if kind == "none":
            return ReturnConditioning(kind=kind)
        if kind == "success":
            return ReturnConditioning(kind=kind, target=1.0)
        if kind == "advantage":
            return ReturnConditioning(kind=kind, scale=float(max_episode_steps), target=float(max_episode_steps))
        largest = float(np.abs([r for found in self.episode_returns.values() for r in found]).max()) or 1.0
        if kind == "reward_advantage":
            return ReturnConditioning(kind=kind, scale=largest, target=largest)
        if kind == "steps_to_success":
            scale, ceiling = float(max_episode_steps), -1.0
            reached = {task: [-float(n) for n in lengths] for task, lengths in self.success_lengths.items()}
        else:
            scale, ceiling = largest, -1.0
            reached = {task: list(found) for task, found in self.episode_returns.items()}
        everything = [value for found in reached.values() for value in found] or [-float(max_episode_steps)]
        worded: dict[str, set[str]] = {words: {task} for words, task in self.instructions.items()}
        for task, wordings in (phrases or {}).items():
            for words in wordings:
                worded.setdefault(words, set()).add(task)
        targets: dict[str, float] = {}
        for words, tasks in worded.items():
            # Tasks in different scenes may share a wording; what all of them reached is pooled.
            values = [value for task in sorted(tasks) for value in reached.get(task, ())]
            if values:
                targets[words] = float(np.quantile(values, quantile))
        return ReturnConditioning(
            kind=kind,
            scale=scale,
            target=float(np.quantile(everything, quantile)),
            targets=targets if len(reached) > 1 else {},
            ceiling=ceiling,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "ReplayStatistics":
        """Inverse of ``to_json``, also after a way through JSON, which knows no tuples."""
        return cls(
            num_steps=fields["num_steps"],
            proprio_mean=tuple(fields["proprio_mean"]),
            proprio_std=tuple(fields["proprio_std"]),
            success_lengths={task: tuple(found) for task, found in fields["success_lengths"].items()},
            episode_returns={task: tuple(found) for task, found in fields["episode_returns"].items()},
            instructions=dict(fields["instructions"]),
        )
