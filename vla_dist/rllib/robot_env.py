"""A RobotEnv as a Gymnasium environment, so that RLlib runs our simulators as well as those that are Gymnasium's."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box

from vla_dist.core.protocols import RobotEnv
from vla_dist.core.seeding import evaluation_seed
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Array, Observation
from vla_dist.rllib.policy_module import PROPRIO
from vla_dist.rllib.spaces import action_row, action_space, observation_space

_TRAINING_SEEDS = 2**31
"""See ``core.seeding``."""


class RobotGymEnv(gym.Env[Any, Any]):
    """One task of one robot, in the words given::

        config.environment(lambda _: RobotGymEnv(make_env("t-maze", tasks=("t-maze-10",)), task="t-maze-10"))

    Observations are the (P,) reading, or with cameras a dictionary of it and their frames.
    """

    def __init__(
        self,
        robot: RobotEnv,
        *,
        task: str,
        instruction: str | None = None,
        seed: int | None = None,
        is_evaluation: bool = False,
    ) -> None:
        """
        Args:
            robot: closed with this.
            task: of every episode.
            instruction: the words; None: the environment's own.
            seed: of all episodes, until ``reset`` is given another; None: never the same.
            is_evaluation: draw episodes that no training can have, instead of those that it may.
        """
        self.robot = robot
        self._task, self._instruction = task, instruction
        self._rng = np.random.default_rng(seed)
        self._is_evaluation = is_evaluation
        spec = robot.spec
        self.action_space = action_space(spec)
        self.observation_space = observation_space(spec)
        if spec.cameras:
            frames = {c.name: Box(0, 255, (c.height, c.width, 3), np.uint8) for c in spec.cameras}
            self.observation_space = gym.spaces.Dict({PROPRIO: observation_space(spec), **frames})

    @property
    def contract(self) -> EnvSpec:
        """For ``stream_episodes(spec=)``."""
        return self.robot.spec

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        drawn = int(self._rng.integers(_TRAINING_SEEDS))
        episode_seed = evaluation_seed(drawn, 0) if self._is_evaluation else drawn
        step = self.robot.reset(seed=episode_seed, task=self._task, instruction=self._instruction)
        return self._seen(step.observation), {"instruction": step.observation.instruction}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        step = self.robot.step(action_row(action, self.action_space))
        info = {"is_success": step.success}
        return self._seen(step.observation), step.reward, step.terminated, step.truncated, info

    def render(self) -> Array:
        return self.robot.render()

    def close(self) -> None:
        self.robot.close()

    def _seen(self, observation: Observation) -> Any:
        if not self.robot.spec.cameras:
            return observation.proprio
        return {PROPRIO: observation.proprio, **observation.images}
