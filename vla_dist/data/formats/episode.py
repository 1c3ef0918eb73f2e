"""A whole episode as arrays, between segments on one side and the formats of others on the other.

Dimensions: L steps of the episode, P proprio, A action.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from vla_dist.core.errors import DataError
from vla_dist.core.recorder import EpisodeRecorder
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Array, Observation, Segment, Source


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Episode:
    """One recorded episode."""

    episode_id: str
    robot_id: str
    task: str
    """Machine name."""
    instruction: str
    """The words."""
    source: Source
    policy_version: int
    success: bool
    proprio: Array
    """(L, P) float32."""
    actions: Array
    """(L, A) float32, as executed."""
    target_actions: Array
    """(L, A) float32, to imitate."""
    rewards: Array
    """(L,) float32, raw."""
    interventions: Array
    """(L,) bool, a person had taken over."""
    images: Mapping[str, Array] = field(default_factory=dict[str, Array])
    """camera name -> (L, H, W, 3) uint8."""

    def __post_init__(self) -> None:
        if not len(self.rewards):
            raise DataError(f"episode {self.episode_id!r} has no step")
        for name in ("proprio", "actions", "target_actions", "interventions", *self.images):
            column = self.images[name] if name in self.images else getattr(self, name)
            if len(column) != len(self.rewards):
                raise DataError(
                    f"episode {self.episode_id!r} has {len(column)} of {name} and {len(self.rewards)} rewards"
                )

    @property
    def num_steps(self) -> int:
        """L."""
        return len(self.rewards)

    @property
    def returns_to_go(self) -> Array:
        """(L,) float64, undiscounted."""
        return np.cumsum(self.rewards[::-1], dtype=np.float64)[::-1]


def join_segments(segments: Sequence[Segment]) -> Episode:
    """Raises DataError where they are not one whole episode in order."""
    first, last = segments[0], segments[-1]
    indices = [segment.segment_index for segment in segments]
    if indices != list(range(len(segments))) or not last.is_last:
        raise DataError(f"episode {first.episode_id!r} has segments {indices[:8]}, expected all of them in order")

    def whole(name: str) -> Array:
        return np.concatenate([getattr(segment, name)[: segment.length] for segment in segments])

    return Episode(
        episode_id=first.episode_id,
        robot_id=first.robot_id,
        task=first.task,
        instruction=first.instruction,
        source=first.source,
        policy_version=first.policy_version,
        success=last.success,
        proprio=whole("proprio"),
        actions=whole("actions"),
        target_actions=whole("target_actions"),
        rewards=whole("rewards"),
        interventions=whole("interventions"),
        images={
            camera: np.concatenate([segment.images[camera][: segment.length] for segment in segments])
            for camera in first.images
        },
    )


def cut_episode(episode: Episode, spec: EnvSpec, *, num_steps: int) -> Iterator[Segment]:
    """The segments of an episode, T = ``num_steps`` steps each. Raises DataError where it does not fit the spec."""
    cutter = EpisodeRecorder(
        spec,
        num_steps=num_steps,
        episode_id=episode.episode_id,
        robot_id=episode.robot_id,
        task=episode.task,
        instruction=episode.instruction,
        policy_version=episode.policy_version,
        source=episode.source,
    )
    for step in range(episode.num_steps):
        segment = cutter.add(
            Observation(
                proprio=episode.proprio[step], images={name: frames[step] for name, frames in episode.images.items()}
            ),
            action=episode.actions[step],
            reward=float(episode.rewards[step]),
            target_action=episode.target_actions[step],
            intervention=bool(episode.interventions[step]),
        )
        if segment is not None:
            yield segment
    yield cutter.finish(success=episode.success)
