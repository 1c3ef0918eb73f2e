"""Key-to-Door: a key in the first room decides, rooms later, whether the door's reward can be had.

Source: Chen et al. 2021, "Decision Transformer", section 5.5, after Mesnard et al. 2021. Their grid is not public; this
one is our own: rooms of 6 x 6, phases of 10, 5 and 10 steps, the robot and each object placed anywhere, four moves.

Proprio, P = 12 float32::

    robot      2  its row and column, 0 to 1
    red, blue  6  of a red and of a blue object (keys in the first room, doors in the last): whether it is in this room,
                  and how far south and east of the robot it lies, -1 to 1; zeros where it is not
    room       3  first, empty, last; 0 or 1
    time       1  steps spent in this room, as a share of its phase

Whether the robot carries a key is not shown. The action is the largest of 4 numbers: north, east, south, west. The only
reward is 1 at the right door with its key; the first door that is reached ends the episode.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from vla_dist.core.errors import ConfigError, NotFound
from vla_dist.core.specs import CameraSpec, Dimension, EnvSpec
from vla_dist.core.types import Array, Observation, Step
from vla_dist.envs.instructions import Split
from vla_dist.envs.requirements import one_hot_choice, require_task

ACTIONS = ("north", "east", "south", "west")
SIDE = 6
PHASES = (10, 5, 10)
TASKS: Mapping[str, str] = MappingProxyType(
    {
        "one-door": "take the key and go through the door",
        "matching-door": "take the key and go through the door of its colour",
    }
)
"""Task -> words. In ``matching-door`` the key is red or blue and the last room has a door of each colour, so that a
robot must remember the colour as well; ``one-door`` is the paper's, with everything red."""
_MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))
_COLOURS = ("red", "blue")
_ROOM_AT = (*(room for room, steps in enumerate(PHASES) for _ in range(steps)), len(PHASES) - 1)
_CELL_PX = 32
_PAINT = ((220, 60, 60), (60, 90, 220))

Cell = tuple[int, int]


class KeyToDoorEnv:
    """RobotEnv over the three rooms; the clock alone moves the robot from one to the next.

    Raises:
        ConfigError: an unknown task, or settings that the rooms cannot have.
    """

    def __init__(
        self,
        tasks: Sequence[str] = ("one-door",),
        *,
        cameras: tuple[CameraSpec, ...] = (),
        max_episode_steps: int | None = None,
        instructions: Split = "training",
    ) -> None:
        """``max_episode_steps`` may be more than the phases' 25, which end the episode anyway, but not less."""
        unknown = [task for task in tasks if task not in TASKS]
        if not tasks or isinstance(tasks, str) or unknown:
            raise ConfigError(f"tasks {tasks!r} must be a non-empty tuple of {', '.join(TASKS)}")
        if cameras or instructions != "training":
            raise ConfigError("Key-to-Door has neither cameras nor other wordings; use none, and 'training'")
        steps = sum(PHASES) if max_episode_steps is None else max_episode_steps
        if steps < sum(PHASES):
            raise ConfigError(f"max_episode_steps {steps} ends before the last room does; allow {sum(PHASES)} or more")
        things = [f"{colour}_{what}" for colour in _COLOURS for what in ("is_here", "south", "east")]
        names = ["row", "column", *things, "room_first", "room_empty", "room_last", "time"]
        offsets = ("south", "east")
        self.spec = EnvSpec(
            name="key-to-door",
            proprio=tuple(
                Dimension(name=name, low=-1.0 if name.endswith(offsets) else 0.0, high=1.0) for name in names
            ),
            action=tuple(Dimension(name=name, low=0.0, high=1.0) for name in ACTIONS),
            control_hz=10.0,
            max_episode_steps=steps,
            action_kind="discrete",
        )
        self.tasks = tuple(tasks)
        self._instruction = ""
        self._running = False

    def reset(self, *, seed: int, task: str, instruction: str | None = None) -> Step:
        if task not in self.tasks:
            raise NotFound(f"no task {task!r}; this environment was built for {', '.join(self.tasks)}")
        rng = np.random.default_rng(seed)
        self._starts = [_draw_cell(rng) for _ in PHASES]
        self.colour = int(rng.integers(2)) if task == "matching-door" else 0
        doors = {self.colour: _draw_cell(rng)}
        if task == "matching-door":
            # Two doors in one cell could not be told apart, and one under the robot leaves it no choice.
            taken = {doors[self.colour], self._starts[2]}
            others = [divmod(i, SIDE) for i in range(SIDE**2) if divmod(i, SIDE) not in taken]
            doors[1 - self.colour] = others[int(rng.integers(len(others)))]
        self._objects: list[dict[int, Cell]] = [{self.colour: _draw_cell(rng)}, {}, doors]
        self._instruction = TASKS[task] if instruction is None else instruction
        self._num_steps = 0
        self._cell = self._starts[0]
        self.has_key = False
        self._running = True
        self._touch()
        return Step(observation=self._observation(None, 0.0), info={"success": False})

    def step(self, action: Array) -> Step:
        if not self._running:
            raise RuntimeError("the episode is over or was never started; call reset")
        executed = one_hot_choice(action, len(ACTIONS))
        down, right = _MOVES[int(executed.argmax())]
        self._cell = (min(max(self._cell[0] + down, 0), SIDE - 1), min(max(self._cell[1] + right, 0), SIDE - 1))
        door = self._touch()
        room, self._num_steps = self.room, self._num_steps + 1
        if door is None and self.room != room and self._num_steps < sum(PHASES):
            self._cell = self._starts[self.room]
            door = self._touch()
        success = door is not None and self.has_key and door == self.colour
        truncated = door is None and self._num_steps >= sum(PHASES)
        self._running = not (door is not None or truncated)
        reward = 1.0 if success else 0.0
        return Step(
            observation=self._observation(executed, reward),
            reward=reward,
            terminated=door is not None,
            truncated=truncated,
            info={"success": success, "has_key": self.has_key},
        )

    def render(self, camera: str | None = None) -> Array:
        """(H, W, 3) uint8 of the room that the robot is in: keys small, doors large, the robot white.

        Raises:
            ConfigError: there are no cameras.
            RuntimeError: nothing was reset yet.
        """
        if camera is not None:
            raise ConfigError(f"no camera {camera!r}; Key-to-Door has one view, None")
        if not self._instruction:
            raise RuntimeError("there is nothing to draw before the first reset; call reset")
        picture = np.full((SIDE * _CELL_PX, SIDE * _CELL_PX, 3), 30, np.uint8)
        picture[::_CELL_PX] = picture[:, ::_CELL_PX] = 70
        for colour, cell in self.objects.items():
            _paint(picture, cell, _PAINT[colour], margin=10 if self.room == 0 else 3)
        _paint(picture, self._cell, (240, 240, 240), margin=12)
        return picture

    def close(self) -> None:
        self._running = False

    @property
    def room(self) -> int:
        """0, 1 or 2."""
        return _ROOM_AT[self._num_steps]

    @property
    def cell(self) -> Cell:
        """Row and column of the robot."""
        return self._cell

    @property
    def objects(self) -> dict[int, Cell]:
        """Colour -> cell of what is still there in this room."""
        return {} if self.room == 0 and self.has_key else self._objects[self.room]

    def _touch(self) -> int | None:
        """Take the key that lies here; the colour of the door that is here."""
        here = [colour for colour, cell in self.objects.items() if cell == self._cell]
        if here and self.room == 0:
            self.has_key = True
        return here[0] if here and self.room == 2 else None

    def _observation(self, action: Array | None, reward: float) -> Observation:
        here = np.array(self._cell, np.float32)
        things = np.zeros((len(_COLOURS), 3), np.float32)
        for colour, cell in self.objects.items():
            things[colour] = (1.0, *((np.array(cell) - here) / (SIDE - 1)))
        room = np.eye(len(PHASES), dtype=np.float32)[self.room]
        spent = (self._num_steps - sum(PHASES[: self.room])) / PHASES[self.room]
        return Observation(
            proprio=np.concatenate([here / (SIDE - 1), things.ravel(), room, [spent]]).astype(np.float32),
            instruction=self._instruction,
            previous_action=action,
            previous_reward=reward,
        )


class KeyToDoorExpert:
    """Goes straight to the key, then to the right door, around the wrong one; with nothing to do it walks north."""

    def __init__(self, env: KeyToDoorEnv) -> None:
        self._env = env

    def reset(self, *, task: str, seed: int) -> None:
        """Raises ConfigError when ``task`` is not one of the env's."""
        del seed  # it draws nothing
        require_task(task, self._env.tasks)

    def act(self, observation: Observation) -> Array:
        del observation
        here, objects = self._env.cell, self._env.objects
        aim = objects.get(self._env.colour, (0, here[1]))
        wrong = {cell for colour, cell in objects.items() if colour != self._env.colour}

        def cost(move: Cell) -> tuple[bool, int, int]:
            down, right = abs(here[0] + move[0] - aim[0]), abs(here[1] + move[1] - aim[1])
            # Of equally short ways the one along the longer side, so that a step around a door is not taken back.
            return (here[0] + move[0], here[1] + move[1]) in wrong, down + right, max(down, right)

        best = min(range(len(ACTIONS)), key=lambda index: cost(_MOVES[index]))
        return np.eye(len(ACTIONS), dtype=np.float32)[best]


def _draw_cell(rng: np.random.Generator) -> Cell:
    return int(rng.integers(SIDE)), int(rng.integers(SIDE))


def _paint(picture: Array, cell: Cell, colour: tuple[int, int, int], *, margin: int) -> None:
    top, left = cell[0] * _CELL_PX, cell[1] * _CELL_PX
    picture[top + margin : top + _CELL_PX - margin, left + margin : left + _CELL_PX - margin] = colour
