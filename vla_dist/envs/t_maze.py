"""T-maze: a sign at the start of a corridor tells which way to turn at its end. Nothing else needs to be remembered.

Source: Bakker 2001, "Reinforcement Learning with Long Short-Term Memory", section 5 (the T-junction task).

Proprio, P = 4 float32 of 0 or 1: sign_north, sign_south (at the first cell only), corridor, junction. The action is the
largest of 4 numbers: north, east, south, west. The reward is 4 for the right turn, -0.1 for the wrong one and for each
step that leads nowhere, else 0.
"""

import re
from collections.abc import Sequence

import numpy as np

from vla_dist.core.errors import ConfigError, NotFound
from vla_dist.core.specs import CameraSpec, Dimension, EnvSpec
from vla_dist.core.types import Array, Observation, Step
from vla_dist.envs.instructions import Split
from vla_dist.envs.requirements import one_hot_choice, require_task

ACTIONS = ("north", "east", "south", "west")
SHORTEST, LONGEST = 5, 1000
_WORDS = "walk down the corridor and turn to the side of the sign"
_TASK = re.compile(r"length-(\d+)(?:-(\d+))?")
_CELL_PX, _WIDEST_PX = 16, 1280


class TMazeEnv:
    """RobotEnv over corridors of L cells between the sign and the junction.

    A task is ``length-L``, or ``length-L-M`` where each seed draws a length of L to M, within 5..1000.

    Raises:
        ConfigError: an unknown task, or settings that the maze cannot have.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        cameras: tuple[CameraSpec, ...] = (),
        max_episode_steps: int | None = None,
        instructions: Split = "training",
    ) -> None:
        """``max_episode_steps`` None allows twice the longest way and ten steps more."""
        if not tasks or isinstance(tasks, str):
            raise ConfigError(f"tasks {tasks!r} must be a non-empty tuple, for example ('length-5-30',)")
        if cameras or instructions != "training":
            raise ConfigError("the T-maze has neither cameras nor other wordings; use none, and 'training'")
        self._lengths = {task: _lengths(task) for task in tasks}
        longest = max(high for _, high in self._lengths.values())
        steps = 2 * longest + 10 if max_episode_steps is None else max_episode_steps
        if steps <= longest:
            raise ConfigError(
                f"max_episode_steps {steps} does not reach the end of a corridor of {longest}; allow more than that"
            )
        names = ("sign_north", "sign_south", "corridor", "junction")
        self.spec = EnvSpec(
            name="t-maze",
            proprio=tuple(Dimension(name=name, low=0.0, high=1.0) for name in names),
            action=tuple(Dimension(name=name, low=0.0, high=1.0) for name in ACTIONS),
            control_hz=10.0,
            max_episode_steps=steps,
            action_kind="discrete",
        )
        self.tasks = tuple(tasks)
        self._instruction = ""
        self._length = 0
        self._running = False

    def reset(self, *, seed: int, task: str, instruction: str | None = None) -> Step:
        if task not in self._lengths:
            raise NotFound(f"no task {task!r}; this environment was built for {', '.join(self.tasks)}")
        rng = np.random.default_rng(seed)
        low, high = self._lengths[task]
        self._length = int(rng.integers(low, high + 1))
        self._points_north = bool(rng.integers(2))
        self._instruction = _WORDS if instruction is None else instruction
        self._place = self._num_steps = 0
        self._turned = ""
        self._running = True
        return Step(observation=self._observation(None, 0.0), info={"success": False})

    def step(self, action: Array) -> Step:
        if not self._running:
            raise RuntimeError("the episode is over or was never started; call reset")
        executed = one_hot_choice(action, len(ACTIONS))
        name = ACTIONS[int(executed.argmax())]
        before, self._num_steps = self._place, self._num_steps + 1
        if before == self._length and name in ("north", "south"):
            self._turned = name
        elif name in ("east", "west"):
            self._place = min(max(before + (1 if name == "east" else -1), 0), self._length)
        success = self._turned == self.way
        reward = 4.0 if success else -0.1 if self._turned or self._place == before else 0.0
        terminated = bool(self._turned)
        truncated = not terminated and self._num_steps >= self.spec.max_episode_steps
        self._running = not (terminated or truncated)
        return Step(
            observation=self._observation(executed, reward),
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            info={"success": success},
        )

    def render(self, camera: str | None = None) -> Array:
        """(H, W, 3) uint8 of the whole maze: the sign green, the robot red.

        Raises:
            ConfigError: there are no cameras.
            RuntimeError: nothing was reset yet.
        """
        if camera is not None:
            raise ConfigError(f"no camera {camera!r}; the T-maze has one view, None")
        if not self._length:
            raise RuntimeError("there is nothing to draw before the first reset; call reset")
        cells = np.full((5, self._length + 3, 3), 40, np.uint8)
        cells[2, 1:-1] = cells[1:4, -2] = 200
        cells[1 if self._points_north else 3, 1] = (40, 200, 40)
        row = {"": 2, "north": 1, "south": 3}[self._turned]
        cells[row, 1 + self._place] = (220, 40, 40)
        side = max(1, min(_CELL_PX, _WIDEST_PX // cells.shape[1]))
        return cells.repeat(side, 0).repeat(side, 1)

    def close(self) -> None:
        self._length, self._running = 0, False

    @property
    def way(self) -> str:
        """The right turn, for an expert that may know it."""
        return "north" if self._points_north else "south"

    @property
    def is_at_junction(self) -> bool:
        return self._place == self._length

    def _observation(self, action: Array | None, reward: float) -> Observation:
        at_start, at_end = self._place == 0 and not self._turned, self._place == self._length
        signs = [at_start and self._points_north, at_start and not self._points_north]
        return Observation(
            proprio=np.array([*signs, not (at_start or at_end), at_end], np.float32),
            instruction=self._instruction,
            previous_action=action,
            previous_reward=reward,
        )


class TMazeExpert:
    """Walks east and turns to the side that the sign told, wherever it was pushed meanwhile."""

    def __init__(self, env: TMazeEnv) -> None:
        self._env = env

    def reset(self, *, task: str, seed: int) -> None:
        """Raises ConfigError when ``task`` is not one of the env's."""
        del seed  # it draws nothing
        require_task(task, self._env.tasks)

    def act(self, observation: Observation) -> Array:
        del observation  # it no longer shows the sign
        name = self._env.way if self._env.is_at_junction else "east"
        return np.eye(len(ACTIONS), dtype=np.float32)[ACTIONS.index(name)]


def _lengths(task: str) -> tuple[int, int]:
    found = _TASK.fullmatch(task)
    low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not SHORTEST <= low <= high <= LONGEST:
        raise ConfigError(
            f"unknown task {task!r}; a T-maze task is length-L or length-L-M with {SHORTEST} <= L <= M <= {LONGEST}"
        )
    return low, high
