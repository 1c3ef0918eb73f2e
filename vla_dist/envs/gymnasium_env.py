"""Any registered Gymnasium environment with flat observations, by its id."""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete

from vla_dist.core.errors import ConfigError, DataError, NotFound
from vla_dist.core.specs import ActionKind, CameraSpec, Dimension, EnvSpec
from vla_dist.core.types import Array, Observation, Step
from vla_dist.envs.instructions import Split

_DEFAULT_STEPS = 1000
_FRAMES = "rgb_array"


class GymnasiumEnv:
    """RobotEnv over ``gym.make(id)`` with a (P,) Box observation and a (A,) Box or a Discrete(A) action.

    Its only task, and its words unless others are given, is the id. ``success`` is what the environment reports as
    ``is_success`` or ``success`` in its info, else False: a plain Gymnasium task has a return, not a success.

    Raises:
        ConfigError: an unknown id, spaces of another kind, or settings it cannot have.
    """

    def __init__(
        self,
        env_id: str,
        tasks: Sequence[str] = (),
        *,
        cameras: tuple[CameraSpec, ...] = (),
        max_episode_steps: int | None = None,
        instructions: Split = "training",
    ) -> None:
        """``max_episode_steps`` None keeps the registered limit, or 1000 where there is none."""
        if tuple(tasks) not in ((), (env_id,)):
            raise ConfigError(f"tasks {tuple(tasks)}: gymnasium:{env_id} has the one task {env_id!r}; name it or none")
        if cameras:
            raise ConfigError(f"cameras {[c.name for c in cameras]}: gymnasium:{env_id} offers state alone; use none")
        if instructions != "training":
            raise ConfigError(f"instructions {instructions!r}: gymnasium:{env_id} has no wordings; use 'training'")
        self._env = _make(env_id, max_episode_steps)
        self.spec = spec_of(env_id, self._env)
        self.tasks = (env_id,)
        self._low = np.array([d.low for d in self.spec.action])
        self._high = np.array([d.high for d in self.spec.action])
        self._instruction = env_id
        self._running = False

    def reset(self, *, seed: int, task: str, instruction: str | None = None) -> Step:
        if task not in self.tasks:
            raise NotFound(f"no task {task!r}; this environment has {self.tasks[0]}")
        raw, _ = self._env.reset(seed=seed)
        self._instruction = task if instruction is None else instruction
        self._running = True
        return Step(observation=self._observation(raw, None, 0.0), info={"success": False})

    def step(self, action: Array) -> Step:
        if not self._running:
            raise RuntimeError("the episode is over or was never started; call reset")
        values = np.asarray(action, np.float32)
        if values.shape != (self.spec.action_dim,) or not np.isfinite(values).all():
            raise DataError(f"action {action!r} must be {self.spec.action_dim} finite numbers")
        executed, native = self._native(values)
        raw, reward, terminated, truncated, info = self._env.step(native)
        self._running = not (terminated or truncated)
        return Step(
            observation=self._observation(raw, executed, float(reward)),
            reward=float(reward),
            terminated=bool(terminated),
            truncated=bool(truncated and not terminated),
            info={"success": bool(info.get("is_success", info.get("success", False)))},
        )

    def render(self, camera: str | None = None) -> Array:
        """(H, W, 3) uint8 at the environment's own size. Raises ConfigError where it cannot draw."""
        if camera is not None:
            raise ConfigError(f"no camera {camera!r}; gymnasium:{self.tasks[0]} has one view, None")
        if self._env.render_mode != _FRAMES:
            raise ConfigError(f"gymnasium:{self.tasks[0]} cannot draw frames; it has no {_FRAMES!r} mode")
        return np.asarray(self._env.render(), np.uint8)

    def close(self) -> None:
        self._env.close()
        self._running = False

    def _native(self, values: Array) -> tuple[Array, Any]:
        """What was executed, (A,) float32, and how the environment wants it told."""
        space = self._env.action_space
        if isinstance(space, Discrete):
            executed = np.zeros(len(values), np.float32)
            executed[values.argmax()] = 1.0
            return executed, int(space.start) + int(values.argmax())
        executed = np.clip(values, self._low, self._high).astype(np.float32)
        return executed, executed.astype(space.dtype)

    def _observation(self, raw: Array, action: Array | None, reward: float) -> Observation:
        return Observation(
            proprio=np.array(raw, np.float32),
            instruction=self._instruction,
            previous_action=action,
            previous_reward=reward,
        )


def _make(env_id: str, max_episode_steps: int | None) -> "gym.Env[Any, Any]":
    options: dict[str, Any] = {"disable_env_checker": True, "max_episode_steps": max_episode_steps}
    try:
        registered = gym.spec(env_id)
        if max_episode_steps is None and registered.max_episode_steps is None:
            options["max_episode_steps"] = _DEFAULT_STEPS
        env = gym.make(env_id, **options)
        if _FRAMES in env.metadata.get("render_modes", ()):
            env.close()  # what it can draw is only known from an instance, and how it draws only set at birth
            env = gym.make(env_id, render_mode=_FRAMES, **options)
    except gym.error.Error as error:
        raise ConfigError(f"gymnasium cannot make {env_id!r}: {error}") from error
    return env


def spec_of(env_id: str, env: "gym.Env[Any, Any]") -> EnvSpec:
    """The contract of an environment with a flat Box observation, a flat Box or a Discrete action, and a time limit.

    Raises:
        ConfigError: spaces of another kind, or no limit.
    """
    observation, action = env.observation_space, env.action_space
    if not isinstance(observation, Box) or len(observation.shape) != 1:
        raise ConfigError(f"gymnasium:{env_id} observes {observation}; only a flat Box is supported, wrap it to be one")
    if isinstance(action, Discrete):
        kind: ActionKind = "discrete"
        actions = tuple(Dimension(name=f"choice_{i}", low=0.0, high=1.0) for i in range(int(action.n)))
    elif isinstance(action, Box) and len(action.shape) == 1:
        kind = "continuous"
        bounds = zip(action.low.tolist(), action.high.tolist(), strict=True)
        actions = tuple(Dimension(name=f"action_{i}", low=low, high=high) for i, (low, high) in enumerate(bounds))
    else:
        raise ConfigError(f"gymnasium:{env_id} acts by {action}; only a flat Box or a Discrete is supported, wrap it")
    limit = None if env.spec is None else env.spec.max_episode_steps
    if limit is None:
        raise ConfigError(
            f"gymnasium:{env_id} has no time limit, so its episodes may never be whole; make it with max_episode_steps"
        )
    return EnvSpec(
        name=f"gymnasium:{env_id}",
        proprio=tuple(Dimension(name=f"observation_{i}") for i in range(observation.shape[0])),
        action=actions,
        control_hz=_control_hz(env),
        max_episode_steps=limit,
        action_kind=kind,
    )


def _control_hz(env: "gym.Env[Any, Any]") -> float:
    step_s = getattr(env.unwrapped, "dt", None)
    return 1.0 / float(step_s) if step_s else float(env.metadata.get("render_fps") or 1.0)
