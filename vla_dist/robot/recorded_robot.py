"""A robot whose every executed step is recorded, and which a person may take over at any of them."""

from collections.abc import Callable, Sequence
from typing import Any

from vla_dist.core.errors import Unreachable, VlaDistError
from vla_dist.core.protocols import RobotEnv
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Array, Observation, Source, Step
from vla_dist.protocol.fleet_records import EpisodeRecord
from vla_dist.robot.operator import Operator
from vla_dist.robot.recorder import RecordedEpisode, RobotRecorder


class RecordedRobot:
    """RobotEnv around another one: whoever chooses the actions, what is recorded is what was executed.

    The recording of an episode begins with its first step, so an episode that is reset and never stepped leaves nothing
    behind. Owns neither ``env`` nor ``recorder``.
    """

    def __init__(self, env: RobotEnv, recorder: RobotRecorder, *, operator: Operator | None = None) -> None:
        self._env = env
        self._recorder = recorder
        self._operator = operator
        self._source: Source = "policy"
        self._lease_id = ""
        self._policy_version = 0
        self._target: Array | None = None
        self._task = ""
        self._observation: Observation | None = None
        self._episode: RecordedEpisode | None = None
        self._success = False
        self.is_over = True
        """Whether the episode has come to its end by itself or by a person's verdict."""

    @property
    def spec(self) -> EnvSpec:
        return self._env.spec

    @property
    def tasks(self) -> Sequence[str]:
        return self._env.tasks

    def prepare(self, *, source: Source, lease_id: str = "", policy_version: int = 0) -> None:
        """Say who will act in the next episode, and for which assignment."""
        self._source, self._lease_id, self._policy_version = source, lease_id, policy_version

    def set_policy_version(self, version: int) -> None:
        """Once a session has been granted."""
        self._policy_version = version

    def teach(self, target_action: Array | None) -> None:
        """The (A,) action that would have been right for the next step, where a teacher knows it."""
        self._target = target_action

    def reset(self, *, seed: int, task: str, instruction: str | None = None) -> Step:
        """Raises Unreachable where the robot's driver fails; errors of this package are left as they are."""
        step = self._driven(self._env.reset, seed=seed, task=task, instruction=instruction)
        self._task, self._observation = task, step.observation
        self._episode, self._success, self.is_over = None, False, step.is_last
        if self._operator is not None:
            self._operator.reset()
        return step

    def step(self, action: Array) -> Step:
        """Execute the action, or the operator's instead, and record it.

        Raises:
            DataError, ResourceMissing: see ``RecordedEpisode.add``; the episode is closed as partial.
            Unreachable: the driver failed; the steps before it are the caller's to ``finish``.
        """
        before = self._observation
        assert before is not None, "reset comes first"
        command = None if self._operator is None else self._operator.command(before)
        executed = action if command is None else command
        episode = self._episode or self._begin(before)
        step = self._driven(self._env.step, executed)
        told = step.observation.previous_action
        try:
            episode.add(
                before,
                action=executed if told is None else told,
                reward=step.reward,
                target_action=self._target if command is None else executed,
                operator="" if command is None or self._operator is None else self._operator.name,
            )
        except VlaDistError:
            self.is_over = True
            raise
        self._take_notes(episode)
        self._target, self._observation = None, step.observation
        self._success, self.is_over = step.success, step.is_last
        verdict = None if self._operator is None else self._operator.verdict()
        if verdict is not None and self._operator is not None:
            episode.label(success=verdict, operator=self._operator.name)
            self._success, self.is_over = verdict, True
            if not step.is_last:
                return Step(
                    observation=step.observation,
                    reward=step.reward,
                    terminated=True,
                    info={**step.info, "success": verdict},
                )
        return step

    def finish(self, *, lost: str = "") -> EpisodeRecord | None:
        """Close the recording: its record once it is on the disk; None where nothing was executed.

        Args:
            lost: why it ended before its end; empty: it did not, unless it did not come to its end.
        """
        episode, self._episode = self._episode, None
        if episode is None or episode.is_closed:
            return None
        reason = lost or ("" if self.is_over else "stopped before its end")
        return episode.close_partial(reason) if reason else episode.close(success=self._success)

    def note(self, text: str) -> None:
        """Words about the running episode."""
        if self._episode is not None:
            self._episode.note(text)

    def render(self, camera: str | None = None) -> Array:
        return self._env.render(camera)

    def close(self) -> None:
        """A recording that is open ends as partial; the robot itself stays its owner's."""
        self.finish(lost="the recorder was closed")

    @staticmethod
    def _driven(call: Callable[..., Step], *arguments: Any, **options: Any) -> Step:
        """A site's driver raises what its hardware's library raises; that must not end the robot's other episodes."""
        try:
            return call(*arguments, **options)
        except VlaDistError:
            raise
        except Exception as error:  # the edge to code of others
            raise Unreachable(
                f"the robot's driver failed with {type(error).__name__}: {error}; check the robot and its cables"
            ) from error

    def _take_notes(self, episode: RecordedEpisode) -> None:
        if self._operator is not None:
            for text in self._operator.notes():
                episode.note(f"step {episode.num_steps - 1}, {self._operator.name}: {text}")

    def _begin(self, first: Observation) -> RecordedEpisode:
        self._episode = self._recorder.begin(
            task=self._task,
            instruction=first.instruction,
            source=self._source,
            policy_version=self._policy_version,
            lease_id=self._lease_id,
        )
        return self._episode
