"""Cuts the stream of steps of one episode into segments."""

import numpy as np

from vla_dist.core.errors import DataError
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Array, Observation, Segment, Source


class EpisodeRecorder:
    """Collects (observation, action, reward) of one episode and hands out segments of T steps.

    A full segment is held back until the next step or the end is known, because only the last one may say so::

        recorder = EpisodeRecorder(spec, num_steps=32, episode_id=..., ...)
        segment = recorder.add(observation, action=action, reward=step.reward)   # None, or a full segment
        segment = recorder.finish(success=True)                                  # the last one, padded
    """

    def __init__(
        self,
        spec: EnvSpec,
        *,
        num_steps: int,
        episode_id: str,
        robot_id: str,
        task: str,
        instruction: str,
        policy_version: int,
        source: Source,
    ) -> None:
        self.spec = spec
        self.num_steps = num_steps
        self.episode_id = episode_id
        self.robot_id = robot_id
        self.task = task
        self.instruction = instruction
        self.policy_version = policy_version
        self.source: Source = source
        self.total_steps = 0
        self.total_reward = 0.0
        self._segment_index = 0
        self._clear()

    def add(
        self,
        observation: Observation,
        *,
        action: Array,
        reward: float,
        target_action: Array | None = None,
        intervention: bool = False,
    ) -> Segment | None:
        """Record one executed step.

        Args:
            observation: what was perceived before the action.
            action: (A,) as executed.
            reward: raw, received after the action.
            target_action: (A,) to imitate; None where nobody labelled the step.
            intervention: a person had taken over.

        Returns:
            The previous T steps once the step after them arrives, else None.
        """
        full = self._emit(is_last=False, success=False) if self._length == self.num_steps else None
        row = self._length
        self._write("proprio", self._proprio, row, observation.proprio)
        self._write("action", self._actions, row, action)
        self._write("target action", self._targets, row, action if target_action is None else target_action)
        for camera in self.spec.cameras:
            frame = observation.images.get(camera.name)
            if frame is None:
                raise DataError(
                    f"the observation lacks camera {camera.name!r}; it has {sorted(observation.images)}, "
                    f"the spec {self.spec.name!r} promises {[c.name for c in self.spec.cameras]}"
                )
            self._write(f"camera {camera.name}", self._images[camera.name], row, frame)
        self._rewards[row] = reward
        self._interventions[row] = intervention
        self._length += 1
        self.total_steps += 1
        self.total_reward += reward
        return full

    def finish(self, *, success: bool) -> Segment:
        """The last segment. Raises DataError when no step was recorded."""
        if self._length == 0:
            raise DataError(f"episode {self.episode_id} ended before its first step; record at least one")
        return self._emit(is_last=True, success=success)

    def _emit(self, *, is_last: bool, success: bool) -> Segment:
        segment = Segment(
            episode_id=self.episode_id,
            segment_index=self._segment_index,
            robot_id=self.robot_id,
            task=self.task,
            instruction=self.instruction,
            policy_version=self.policy_version,
            source=self.source,
            is_last=is_last,
            success=success,
            length=self._length,
            proprio=self._proprio,
            actions=self._actions,
            target_actions=self._targets,
            rewards=self._rewards,
            interventions=self._interventions,
            images=self._images,
        )
        self._segment_index += 1
        self._clear()
        return segment

    def _clear(self) -> None:
        # New arrays each time: an emitted segment owns its rows.
        num_steps, spec = self.num_steps, self.spec
        self._length = 0
        self._proprio = np.zeros((num_steps, spec.proprio_dim), np.float32)
        self._actions = np.zeros((num_steps, spec.action_dim), np.float32)
        self._targets = np.zeros((num_steps, spec.action_dim), np.float32)
        self._rewards = np.zeros(num_steps, np.float32)
        self._interventions = np.zeros(num_steps, bool)
        self._images = {c.name: np.zeros((num_steps, c.height, c.width, 3), np.uint8) for c in spec.cameras}

    @staticmethod
    def _write(name: str, column: Array, row: int, value: Array) -> None:
        if np.shape(value) != column.shape[1:]:
            raise DataError(f"{name} has shape {np.shape(value)}, expected {column.shape[1:]}")
        column[row] = value
