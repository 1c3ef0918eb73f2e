"""Any object with LeRobot's Robot interface as a RobotEnv; lerobot itself is not needed.

Source: huggingface/lerobot 0.4, ``lerobot/robots/robot.py``: ``observation_features`` and ``action_features`` name the
values (``float``, or a shape for cameras), ``get_observation`` and ``send_action`` take and give flat dictionaries, and
``send_action`` answers what was truly sent.
"""

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from vla_dist.core.errors import ConfigError, DataError, NotFound, ResourceMissing, Unreachable
from vla_dist.core.specs import CameraSpec, Dimension, EnvSpec
from vla_dist.core.types import Array, Observation, Step

_OPTIONS = ("factory", "control_hz", "bounds")


class LeRobotInterface(Protocol):
    """What the adapter uses of it."""

    name: str

    @property
    def observation_features(self) -> Mapping[str, Any]: ...

    @property
    def action_features(self) -> Mapping[str, Any]: ...

    @property
    def is_connected(self) -> bool: ...

    def connect(self) -> None: ...

    def get_observation(self) -> Mapping[str, Any]: ...

    def send_action(self, action: dict[str, float]) -> Mapping[str, Any]: ...

    def disconnect(self) -> None: ...


class LeRobotRobot:
    """RobotEnv over such a robot: an episode ends after ``max_episode_steps``, or when a person says so.

    Actions are clipped to ``action_bounds`` before they are sent. The world is reset by people: ``reset`` only waits
    for ``settle_s`` and looks.

    Args:
        robot: connected at the first reset where it is not yet.
        tasks: names of what it may be asked; the words of an episode are its instruction, or the task's name.
        control_hz: of the contract.
        action_bounds: name -> (low, high) in the robot's units; what is not named is open.
        judge: says after each step whether the task is done; None: only an operator can.
    """

    def __init__(
        self,
        robot: LeRobotInterface,
        *,
        tasks: Sequence[str],
        control_hz: float,
        max_episode_steps: int,
        action_bounds: Mapping[str, tuple[float, float]] | None = None,
        judge: Callable[[Observation], bool] | None = None,
        settle_s: float = 0.0,
    ) -> None:
        if not tasks:
            raise ConfigError("a robot needs at least one task; got none")
        bounds = dict(action_bounds or {})
        actions = _scalars("action", robot.action_features)
        strangers = sorted(set(bounds) - set(actions))
        if strangers:
            raise ConfigError(f"action_bounds name {strangers}, which the robot has not; it has {', '.join(actions)}")
        self._robot = robot
        self.tasks = tuple(tasks)
        self.spec = EnvSpec(
            name=f"lerobot:{robot.name}",
            proprio=tuple(Dimension(name=name) for name in _scalars("observation", robot.observation_features)),
            action=tuple(
                Dimension(name=name, low=bounds[name][0], high=bounds[name][1])
                if name in bounds
                else Dimension(name=name)
                for name in actions
            ),
            control_hz=control_hz,
            max_episode_steps=max_episode_steps,
            cameras=_cameras(robot.observation_features),
        )
        self._low = np.array([d.low for d in self.spec.action])
        self._high = np.array([d.high for d in self.spec.action])
        self._judge = judge
        self._settle_s = settle_s
        self._instruction = ""
        self._steps = max_episode_steps

    def reset(self, *, seed: int, task: str, instruction: str | None = None) -> Step:
        del seed  # people lay out the scene
        if task not in self.tasks:
            raise NotFound(f"no task {task!r}; this robot is told of {', '.join(self.tasks)}")
        if not self._robot.is_connected:
            self._robot.connect()
        self._instruction = task if instruction is None else instruction
        time.sleep(self._settle_s)
        self._steps = 0
        return Step(observation=self._look(None), info={"success": False})

    def step(self, action: Array) -> Step:
        values = np.asarray(action, np.float32)
        if values.shape != (self.spec.action_dim,) or not np.isfinite(values).all():
            raise DataError(f"action {action!r} must be {self.spec.action_dim} finite numbers")
        if self._steps >= self.spec.max_episode_steps:
            raise RuntimeError("the episode is over or was never started; call reset")
        clipped = np.clip(values, self._low, self._high)
        names = [d.name for d in self.spec.action]
        sent = self._robot.send_action({name: float(value) for name, value in zip(names, clipped, strict=True)})
        self._steps += 1
        observation = self._look(np.array([sent[name] for name in names], np.float32))
        success = bool(self._judge is not None and self._judge(observation))
        truncated = not success and self._steps >= self.spec.max_episode_steps
        if success:
            self._steps = self.spec.max_episode_steps
        return Step(
            observation=observation,
            reward=float(success),
            terminated=success,
            truncated=truncated,
            info={"success": success},
        )

    def render(self, camera: str | None = None) -> Array:
        """What a camera sees now. Raises ConfigError where there is none."""
        names = [one.name for one in self.spec.cameras]
        if not names or (camera is not None and camera not in names):
            raise ConfigError(f"no camera {camera!r}; this robot has {', '.join(names) or 'none'}")
        return np.asarray(self._robot.get_observation()[camera or names[0]], np.uint8)

    def close(self) -> None:
        if self._robot.is_connected:
            self._robot.disconnect()

    def _look(self, executed: Array | None) -> Observation:
        try:
            seen = self._robot.get_observation()
        except (OSError, TimeoutError) as error:
            raise Unreachable(f"robot {self._robot.name!r} gave no observation ({error}); check its cables") from error
        missing = [d.name for d in self.spec.proprio if d.name not in seen]
        if missing:
            raise DataError(f"robot {self._robot.name!r} gave no {', '.join(missing[:6])}; check its motors")
        # A camera that is unplugged is left out here; whoever records says so and keeps what came before.
        images = {one.name: np.asarray(seen[one.name]) for one in self.spec.cameras if seen.get(one.name) is not None}
        return Observation(
            proprio=np.array([seen[d.name] for d in self.spec.proprio], np.float32),
            instruction=self._instruction,
            images=images,
            previous_action=executed,
        )


def build_lerobot(options: Mapping[str, str], *, tasks: Sequence[str], max_episode_steps: int) -> LeRobotRobot:
    """From the options ``factory`` (``MODULE:FUNCTION``, which gives the robot object), ``control_hz``, and ``bounds``
    (``LOW:HIGH`` of every action) or ``bounds.NAME`` (of one).

    Raises:
        ConfigError: an option is missing or unknown.
        ResourceMissing: the factory cannot be imported.
    """
    unknown = sorted(one for one in options if one not in _OPTIONS and not one.startswith("bounds."))
    if unknown or "factory" not in options:
        raise ConfigError(
            "lerobot needs factory=MODULE:FUNCTION and takes control_hz=HZ, bounds=LOW:HIGH and bounds.NAME=LOW:HIGH; "
            f"got {sorted(options)}"
        )
    module, _, function = options["factory"].partition(":")
    try:
        robot: LeRobotInterface = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise ResourceMissing(f"factory {options['factory']!r} cannot be imported: {error}") from error
    try:
        control_hz = float(options.get("control_hz", "30"))
    except ValueError as error:
        raise ConfigError(f"control_hz {options['control_hz']!r} must be a number") from error
    bounds: dict[str, tuple[float, float]] = {}
    if "bounds" in options:
        bounds = dict.fromkeys(_scalars("action", robot.action_features), _range(options["bounds"]))
    for option, text in options.items():
        if option.startswith("bounds."):
            bounds[option.removeprefix("bounds.")] = _range(text)
    return LeRobotRobot(
        robot, tasks=tasks, control_hz=control_hz, max_episode_steps=max_episode_steps, action_bounds=bounds
    )


def _range(text: str) -> tuple[float, float]:
    low, _, high = text.partition(":")
    try:
        found = float(low), float(high)
    except ValueError as error:
        raise ConfigError(f"bounds {text!r} must be written LOW:HIGH, as in -100:100") from error
    if not found[0] < found[1]:
        raise ConfigError(f"bounds {text!r}: the first must be below the second")
    return found


def _scalars(what: str, features: Mapping[str, Any]) -> list[str]:
    names = [name for name, kind in features.items() if not isinstance(kind, tuple)]
    if not names:
        raise ConfigError(f"the robot's {what}_features name no number: {dict(features)}")
    return names


def _cameras(features: Mapping[str, Any]) -> tuple[CameraSpec, ...]:
    cameras = []
    for name, shape in features.items():
        if isinstance(shape, tuple):
            if len(shape) != 3 or shape[2] != 3:
                raise ConfigError(f"camera {name!r} has shape {shape}, expected (height, width, 3)")
            cameras.append(CameraSpec(name=name, height=int(shape[0]), width=int(shape[1])))
    return tuple(cameras)
