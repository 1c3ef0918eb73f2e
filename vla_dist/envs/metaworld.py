"""Meta-World's tabletop tasks, and a drawer-and-button scene, as one robot with one contract.

All tasks share an ``EnvSpec``, so one policy serves them all and only objects and words tell them apart: the goal that
Meta-World puts into its observation is masked to zero. (``reach``, ``push`` and ``pick-place`` have goals in free
space; without the goal they need a camera, which sees a coloured mark there, or ``shows_goal``.) Without
``shows_objects`` the places of the objects are masked too: as on a real robot, only a camera tells where they are.

An episode ends with ``terminated`` at the first step that meets the task's own success condition, which Meta-World
itself never does, and with ``truncated`` at ``max_episode_steps``. ``info`` holds ``success`` and ``achieved``: the
tasks whose condition holds now. In the scene that tells what a run with a wrong instruction did.
"""

from vla_dist.envs.gl import mujoco  # first: it guards the import of MuJoCo

# isort: split
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from metaworld.env_dict import ALL_V3_ENVIRONMENTS

from vla_dist.core.errors import ConfigError, DataError, NotFound
from vla_dist.core.specs import CameraSpec, Dimension, EnvSpec
from vla_dist.core.types import Array, Observation, Step
from vla_dist.envs.drawer_button import JOINT, PREFIX, DrawerButtonSimulator
from vla_dist.envs.instructions import SPLITS, WORDED_TASKS, Split, instruction_for
from vla_dist.envs.rendering import TABLE_VIEW, SceneRenderer

MAX_STEPS = 500
"""Meta-World's own limit."""
CAMERAS = (TABLE_VIEW, "corner", "corner2", "corner3", "corner4", "topview", "gripperPOV", "behindGripper")
CONTROL_HZ = 80.0
GOAL = slice(36, 39)
OBJECTS = (slice(4, 18), slice(22, 36))
"""Of proprio: now, and a step ago."""
_VIDEO_SIZE = 256
_MAX_SIMULATORS = 10
"""Simulators kept warm, at 10 to 30 MiB each; building one takes 0.15 to 0.5 s."""
_LAYOUT_FIELDS = ("body_pos", "body_quat", "site_pos")
"""Parts of the model that a reset overwrites with the episode's layout."""


def tabletop_spec(
    cameras: tuple[CameraSpec, ...] = (),
    max_episode_steps: int = 200,
    *,
    shows_goal: bool = False,
    shows_objects: bool = True,
) -> EnvSpec:
    """The one contract of every task here."""
    hidden = "" if shows_objects else "_masked"
    current = (
        *(Dimension(name=f"hand_{axis}", unit="m") for axis in "xyz"),
        Dimension(name="gripper_opening"),
        *(d for index in (1, 2) for d in _object(f"object_{index}", hidden)),
    )
    previous = tuple(Dimension(name=f"previous_{d.name}", unit=d.unit) for d in current)
    suffix = "" if shows_goal else "_masked"
    goal = tuple(Dimension(name=f"goal_{axis}{suffix}", unit="m") for axis in "xyz")
    return EnvSpec(
        name="metaworld",
        proprio=(*current, *previous, *goal),
        action=tuple(
            Dimension(name=name, low=-1.0, high=1.0) for name in ("move_x", "move_y", "move_z", "close_gripper")
        ),
        control_hz=CONTROL_HZ,
        max_episode_steps=max_episode_steps,
        cameras=cameras,
    )


def _object(name: str, suffix: str) -> tuple[Dimension, ...]:
    return (
        *(Dimension(name=f"{name}_{axis}{suffix}", unit="m") for axis in "xyz"),
        *(Dimension(name=f"{name}_q{part}{suffix}") for part in "wxyz"),
    )


class MetaWorldEnv:
    """RobotEnv over Meta-World tasks (``drawer-open``) and scene tasks (``scene/drawer-open``).

    Actions move the hand by up to 1 cm a step and axis and close (+1) or open (-1) the gripper. Not thread-safe; with
    cameras, stay in one thread.

    Raises:
        ConfigError: an unknown task, camera, split or step limit.
        ResourceMissing: images are asked for (by a camera or ``render``) and this machine cannot draw.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        cameras: tuple[CameraSpec, ...] = (),
        max_episode_steps: int = 200,
        instructions: Split = "training",
        shows_goal: bool = False,
        shows_objects: bool = True,
    ) -> None:
        """``shows_goal`` leaves Meta-World's goal in proprio, as its own benchmarks do; the scene has none to show."""
        _check(tasks, cameras, max_episode_steps, instructions)
        self.spec = tabletop_spec(cameras, max_episode_steps, shows_goal=shows_goal, shows_objects=shows_objects)
        self._masked = (*(() if shows_goal else (GOAL,)), *(() if shows_objects else OBJECTS))
        self.tasks = tuple(tasks)
        self._split: Split = instructions
        self._simulators: dict[str, _Simulator] = {}
        self._current: _Simulator | None = None
        self._task = ""
        self._instruction = ""
        self._full = np.zeros(self.spec.proprio_dim)
        self._steps = 0
        self._running = False

    def reset(self, *, seed: int, task: str, instruction: str | None = None) -> Step:
        if task not in self.tasks:
            raise NotFound(f"no task {task!r}; this environment was built for {', '.join(self.tasks)}")
        self._current = self._simulator(task)
        self._task = task
        self._instruction = instruction_for(task, seed, self._split) if instruction is None else instruction
        self._full = self._current.restart(task, seed)
        self._steps, self._running = 0, True
        return Step(observation=self._observation(None, 0.0), info={"success": False, "achieved": ()})

    def step(self, action: Array) -> Step:
        if not self._running or self._current is None:
            raise RuntimeError("the episode is over or was never started; call reset")
        executed = _checked_action(action)
        self._full, reward, _, _, raw = self._current.env.step(executed)
        self._steps += 1
        success = bool(raw["success"])
        truncated = not success and self._steps >= self.spec.max_episode_steps
        self._running = not (success or truncated)
        achieved = raw.get("achieved", (self._task,) if success else ())
        return Step(
            observation=self._observation(executed, float(reward)),
            reward=float(reward),
            terminated=success,
            truncated=truncated,
            info={"success": success, "achieved": achieved},
        )

    def render(self, camera: str | None = None) -> Array:
        """(256, 256, 3) uint8 RGB; the default view, ``table``, shows it from the robot's right.

        Raises:
            RuntimeError: nothing was reset yet.
        """
        if self._current is None:
            raise RuntimeError("there is nothing to draw before the first reset; call reset")
        return self._draw(TABLE_VIEW if camera is None else camera, _VIDEO_SIZE, _VIDEO_SIZE)

    def close(self) -> None:
        for simulator in self._simulators.values():
            simulator.close()
        self._simulators.clear()
        self._current, self._running = None, False

    @property
    def task(self) -> str:
        """The task of the running episode."""
        return self._task

    @property
    def skill(self) -> str:
        """The single task that is to be done now: of a sequence the first that is not done, else the task itself."""
        return self._current.env.skill if self._current is not None and JOINT in self._task else self._task

    def full_observation(self) -> Array:
        """(39,) float64, the last observation with its goal: what a scripted expert may see and a policy may not."""
        return self._full

    def _simulator(self, task: str) -> "_Simulator":
        key = PREFIX if task.startswith(PREFIX) else task
        found = self._simulators.pop(key, None)
        if found is None:
            if len(self._simulators) >= _MAX_SIMULATORS:
                self._simulators.pop(next(iter(self._simulators))).close()
            found = _Simulator.build(key, self.spec.max_episode_steps)
        self._simulators[key] = found  # a dict keeps its order: the first is the one unused for longest
        return found

    def _observation(self, action: Array | None, reward: float) -> Observation:
        proprio = self._full.astype(np.float32)
        for part in self._masked:
            proprio[part] = 0.0
        return Observation(
            proprio=proprio,
            instruction=self._instruction,
            images={c.name: self._draw(c.name, c.height, c.width) for c in self.spec.cameras},
            previous_action=action,
            previous_reward=reward,
        )

    def _draw(self, camera: str, height: int, width: int) -> Array:
        assert self._current is not None
        sizes = [(_VIDEO_SIZE, _VIDEO_SIZE), *((c.height, c.width) for c in self.spec.cameras)]
        return self._current.draw(camera, height, width, largest=tuple(map(max, zip(*sizes, strict=True))))


@dataclass(slots=True, eq=False)
class _Simulator:
    """One Meta-World task class with its model as it was before any episode, and its renderer once one is needed."""

    env: Any
    pristine: dict[str, Array]
    renderer: SceneRenderer | None = None

    @classmethod
    def build(cls, key: str, max_episode_steps: int) -> "_Simulator":
        env: Any = DrawerButtonSimulator() if key == PREFIX else ALL_V3_ENVIRONMENTS[f"{key}-v3"]()
        # Meta-World wants a Task object to be set; seeding it directly needs these switches instead. The observation
        # space was cached while the goal was hidden and would clip it to zero.
        env._partially_observable = False
        env._set_task_called = True
        env._freeze_rand_vec = False
        env.seeded_rand_vec = True
        env.max_path_length = max_episode_steps
        env.__dict__.pop("sawyer_observation_space", None)
        return cls(env, {field: getattr(env.model, field).copy() for field in _LAYOUT_FIELDS})

    def restart(self, task: str, seed: int) -> Array:
        """(39,) float64 first observation, a function of (task, seed) alone.

        Meta-World reads positions of the PREVIOUS layout at reset, before MuJoCo has moved anything: the model is
        put back to its pristine layout first, and the observation is read again once the new one is in force.
        """
        env = self.env
        for field, values in self.pristine.items():
            getattr(env.model, field)[:] = values
        env.seed(seed)
        if task.startswith(PREFIX):
            env.task = task
        env.reset()
        mujoco.mj_forward(env.model, env.data)
        for site in env._target_site_config:
            env._set_pos_site(*site)
        env._prev_obs = env._get_curr_obs_combined_no_goal()
        return np.concatenate((env._prev_obs, env._prev_obs, env._target_pos))

    def draw(self, camera: str, height: int, width: int, *, largest: tuple[int, ...]) -> Array:
        if self.renderer is None:
            self.renderer = SceneRenderer(self.env.model, height=largest[0], width=largest[1])
        return self.renderer.frame(self.env.data, camera, height=height, width=width)

    def close(self) -> None:
        if self.renderer is not None:
            self.renderer.close()
            self.renderer = None
        self.env.close()


def _checked_action(action: Array) -> Array:
    """(4,) float32 within bounds."""
    values = np.asarray(action, np.float32)
    if values.shape != (4,) or not np.isfinite(values).all():
        raise DataError(f"action {action!r} must be 4 finite numbers (move_x, move_y, move_z, close_gripper)")
    return np.minimum(np.maximum(values, -1.0), 1.0)


def _check(tasks: Sequence[str], cameras: tuple[CameraSpec, ...], max_episode_steps: int, instructions: str) -> None:
    if not tasks or isinstance(tasks, str):
        raise ConfigError(f"tasks {tasks!r} must be a non-empty tuple of task names")
    unknown = [task for task in tasks if task not in WORDED_TASKS]
    if unknown:
        raise ConfigError(f"unknown tasks {unknown}; choose among {', '.join(WORDED_TASKS)}")
    unseen = [camera.name for camera in cameras if camera.name not in CAMERAS]
    if unseen:
        raise ConfigError(f"unknown cameras {unseen}; choose among {', '.join(CAMERAS)}")
    if not 1 <= max_episode_steps <= MAX_STEPS:
        raise ConfigError(f"max_episode_steps {max_episode_steps} must be within 1..{MAX_STEPS}")
    if instructions not in SPLITS:
        raise ConfigError(f"instructions {instructions!r} must be one of {', '.join(SPLITS)}")
