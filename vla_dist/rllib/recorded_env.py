"""What an environment was really asked and really gave, whatever an algorithm makes of it."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np

from vla_dist.core.recorder import EpisodeRecorder
from vla_dist.core.types import Observation, Segment
from vla_dist.rllib.spaces import action_row


class RecordedEnv(gym.Wrapper[Any, Any, Any, Any]):
    """Gives each whole episode to ``on_episode`` once, and changes nothing.

    It stands between RLlib's vector and the environment, so it sees the raw observation and the executed action.
    RLlib's own episodes hold what its connectors made of the one, and the module's action before it was scaled to the
    bounds; an algorithm that begins with random actions stores those as executed, and nothing tells the two apart.
    """

    def __init__(
        self,
        env: "gym.Env[Any, Any]",
        *,
        begin: Callable[[], EpisodeRecorder],
        on_episode: Callable[[list[Segment]], None],
        on_close: Callable[[], None],
    ) -> None:
        """
        Args:
            env: with a flat Box observation.
            begin: a recorder for a new episode.
            on_episode: told of the segments of each whole episode. One that a reset ended early is told to nobody.
            on_close: called with the environment.
        """
        super().__init__(env)
        self._begin = begin
        self._on_episode = on_episode
        self._on_close = on_close
        self._recorder: EpisodeRecorder | None = None
        self._segments: list[Segment] = []
        self._observation: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        self._recorder, self._segments = self._begin(), []
        self._observation = np.array(observation, np.float32)
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        result = self.env.step(action)
        if self._recorder is not None:
            self._record(self._recorder, action, *result)
        return result

    def close(self) -> None:
        super().close()
        self._on_close()

    def _record(
        self,
        recorder: EpisodeRecorder,
        action: Any,
        observation: Any,
        reward: Any,
        terminated: bool,
        truncated: bool,
        info: dict[str, Any],
    ) -> None:
        full = recorder.add(
            Observation(proprio=self._observation),
            action=action_row(action, self.env.action_space),
            reward=float(reward),
        )
        if full is not None:
            self._segments.append(full)
        self._observation = np.array(observation, np.float32)
        if terminated or truncated:
            success = bool(info.get("is_success", info.get("success", False)))
            self._on_episode([*self._segments, recorder.finish(success=success)])
            self._recorder, self._segments = None, []
