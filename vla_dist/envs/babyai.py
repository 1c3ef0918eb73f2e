"""BabyAI: a grid world whose missions are sentences, for fast work on language.

Source: Chevalier-Boisvert et al., 2019.

Proprio, P = 789 float32 of 0 or 1::

    for row in 0..6, for column in 0..6 of the 7x7 view (the agent stands in row 6, column 3 and looks up):
        kind    7  unseen, empty, wall, door, key, ball, box
        colour  6  red, green, blue, purple, yellow, grey      (doors, keys, balls and boxes only)
        state   3  open, closed, locked                        (doors only)
    direction   4  east, south, west, north
    carrying    1  what is carried shows in the agent's own cell

The action is the largest of 7 numbers: left, right, forward, pickup, drop, toggle, done.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import gymnasium as gym
import minigrid  # noqa: F401  registers the levels
import numpy as np
from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX, STATE_TO_IDX
from minigrid.envs.babyai.core import roomgrid_level
from minigrid.envs.babyai.core.verifier import AfterInstr, AndInstr, BeforeInstr, GoToInstr
from minigrid.envs.babyai.goto import GoToSeq
from minigrid.utils.baby_ai_bot import BabyAIBot, DisappearedBoxError

from vla_dist.core.errors import ConfigError, NotFound
from vla_dist.core.specs import CameraSpec, Dimension, EnvSpec
from vla_dist.core.types import Array, Observation, Step
from vla_dist.envs.instructions import Split
from vla_dist.envs.requirements import one_hot_choice

_log = logging.getLogger(__name__)

TASK_STEPS: Mapping[str, int] = MappingProxyType(
    {
        "GoToObj": 64,
        "GoToRedBall": 64,
        "GoToRedBallGrey": 64,
        "GoToLocal": 64,
        "PickupLoc": 64,
        "PickupDist": 64,
        "PutNextLocal": 128,
        "UnlockLocal": 128,
        "Open": 256,
        "GoTo": 384,
        "Pickup": 384,
        "Synth": 384,
        "GoToSeq": 512,
        "GoToSeqS5R2": 128,
        "GoToSeqLocal": 96,
        "SynthSeq": 512,
        "BossLevel": 640,
    }
)
"""Step limit of each task: more than twice the longest of 40 episodes of the bot."""
_OWN_LEVELS: Mapping[str, Callable[[], Any]] = MappingProxyType(
    {
        "GoToSeqLocal": lambda: GoToSeq(room_size=8, num_rows=1, num_cols=1, num_dists=8, instr_kinds=["seq"]),
    }
)
"""Levels that BabyAI can build and has no name for: GoToSeq in GoToLocal's room, where it is the order that is hard and
not the search."""
ACTIONS = ("left", "right", "forward", "pickup", "drop", "toggle", "done")
CAMERA = "view"
_VIEW = 7
_KINDS = ("unseen", "empty", "wall", "door", "key", "ball", "box")
_COLOURED = frozenset({"door", "key", "ball", "box"})
_VIDEO_TILE = 32


def _log_rejection(*words: object) -> None:
    _log.debug(" ".join(str(word) for word in words))


# The level generator prints each rejected sample to stdout; its module gets a print of its own, and nobody else's.
roomgrid_level.print = _log_rejection  # pyright: ignore[reportAttributeAccessIssue]


def babyai_spec(cameras: tuple[CameraSpec, ...], max_episode_steps: int) -> EnvSpec:
    features = [
        *(f"kind_{k}" for k in _KINDS),
        *(f"colour_{c}" for c in COLOR_TO_IDX),
        *(f"state_{s}" for s in STATE_TO_IDX),
    ]
    cells = [f"cell_{row}_{column}_{f}" for row in range(_VIEW) for column in range(_VIEW) for f in features]
    names = [*cells, *(f"direction_{d}" for d in ("east", "south", "west", "north")), "carrying"]
    return EnvSpec(
        name="babyai",
        proprio=tuple(Dimension(name=name, low=0.0, high=1.0) for name in names),
        action=tuple(Dimension(name=name, low=0.0, high=1.0) for name in ACTIONS),
        control_hz=10.0,
        max_episode_steps=max_episode_steps,
        cameras=cameras,
        action_kind="discrete",
    )


class BabyAIEnv:
    """RobotEnv over BabyAI levels (``GoToLocal``). Rewards are BabyAI's: 1 - 0.9 x steps / limit on success, else 0.

    The words are the level's own mission; a replacement changes what the policy reads, not what counts as success.

    Raises:
        ConfigError: an unknown task, or settings that BabyAI cannot have.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        cameras: tuple[CameraSpec, ...] = (),
        max_episode_steps: int | None = None,
        instructions: Split = "training",
    ) -> None:
        """``max_episode_steps`` shortens the tasks' own limits (``TASK_STEPS``); None keeps them."""
        _check(tasks, cameras, instructions)
        longest = max(TASK_STEPS[task] for task in tasks)
        self.spec = babyai_spec(cameras, longest if max_episode_steps is None else max_episode_steps)
        self.tasks = tuple(tasks)
        self._levels: dict[str, Any] = {}
        self._level: Any = None
        self._instruction = ""
        self._gave_up = ""
        self._running = False

    def reset(self, *, seed: int, task: str, instruction: str | None = None) -> Step:
        if task not in self.tasks:
            raise NotFound(f"no task {task!r}; this environment was built for {', '.join(self.tasks)}")
        if task not in self._levels:
            self._levels[task] = _build_level(task)
        self._level = self._levels[task]
        raw, _ = self._level.reset(seed=seed)
        self._level.max_steps = min(TASK_STEPS[task], self.spec.max_episode_steps)
        self._instruction = raw["mission"] if instruction is None else instruction
        self._gave_up, self._running = "", True
        return Step(observation=self._observation(raw, None, 0.0), info={"success": False})

    def step(self, action: Array) -> Step:
        if not self._running:
            raise RuntimeError("the episode is over or was never started; call reset")
        executed = one_hot_choice(action, len(ACTIONS))
        raw, reward, terminated, truncated, _ = self._level.step(int(executed.argmax()))
        success = bool(terminated and reward > 0)
        info: dict[str, Any] = {"success": success}
        if self._gave_up and not terminated:
            terminated = True
            info["gave_up"] = self._gave_up
        self._running = not (terminated or truncated)
        return Step(
            observation=self._observation(raw, executed, float(reward)),
            reward=float(reward),
            terminated=bool(terminated),
            truncated=bool(truncated and not terminated),
            info=info,
        )

    def render(self, camera: str | None = None) -> Array:
        """(H, W, 3) uint8 of the whole grid, or of the agent's view for camera ``view``; 32 px a tile.

        Raises:
            ConfigError: another camera.
            RuntimeError: nothing was reset yet.
        """
        if self._level is None:
            raise RuntimeError("there is nothing to draw before the first reset; call reset")
        if camera not in (None, CAMERA):
            raise ConfigError(f"no camera {camera!r}; BabyAI has {CAMERA!r}, the agent's view")
        return self._level.get_frame(highlight=True, tile_size=_VIDEO_TILE, agent_pov=camera == CAMERA)

    def close(self) -> None:
        for level in self._levels.values():
            level.close()
        self._levels.clear()
        self._level, self._running = None, False

    @property
    def level(self) -> Any:
        """The running level, for an expert that may look into it."""
        return self._level

    @property
    def skill(self) -> str:
        """The part of the mission that is due, such as ``go to red ball``: what an oracle above a controller says.

        Raises:
            ConfigError: what is due is not to go somewhere.
            RuntimeError: nothing was reset yet.
        """
        if self._level is None:
            raise RuntimeError("no mission before the first reset; call reset")
        due = _due(self._level.instrs)
        if not isinstance(due, GoToInstr):
            raise ConfigError(f"{self._level.mission!r} asks for more than to go somewhere; use a GoTo level")
        return " ".join(filter(None, ("go to", due.desc.color, due.desc.type)))

    def give_up(self, reason: str) -> None:
        """End the episode as a failure with its next step, which carries ``info["gave_up"] = reason``."""
        self._gave_up = reason

    def _observation(self, raw: Mapping[str, Any], action: Array | None, reward: float) -> Observation:
        direction = np.zeros(4, np.float32)
        direction[raw["direction"]] = 1.0
        carrying = np.array([self._level.carrying is not None], np.float32)
        images = {c.name: self._level.get_frame(tile_size=c.height // _VIEW, agent_pov=True) for c in self.spec.cameras}
        return Observation(
            proprio=np.concatenate((_one_hot_view(raw["image"]), direction, carrying)),
            instruction=self._instruction,
            images=images,
            previous_action=action,
            previous_reward=reward,
        )


def _build_level(task: str) -> Any:
    if task in _OWN_LEVELS:
        return _OWN_LEVELS[task]()
    return gym.make(f"BabyAI-{task}-v0", disable_env_checker=True).unwrapped


def _due(instruction: Any) -> Any:
    """The innermost part that comes next. Parts joined by "and" may be done in any order; the bot takes the first."""
    if isinstance(instruction, AfterInstr):
        return _due(instruction.instr_a if instruction.b_done == "success" else instruction.instr_b)
    if isinstance(instruction, (AndInstr, BeforeInstr)):
        return _due(instruction.instr_b if instruction.a_done == "success" else instruction.instr_a)
    return instruction


class BabyAIExpert:
    """MiniGrid's bot, planning on the true grid; optimal on the small levels.

    It learns from ``Observation.previous_action`` what was truly executed, so it also labels another policy's steps.
    The bot dies where it finds no plan (an opened box, a blocked room): the episode then ends as a failure with
    ``info["gave_up"]``, instead of an exception that would take its worker down.
    """

    def __init__(self, env: BabyAIEnv) -> None:
        self._env = env
        self._bot: Any = None

    def reset(self, *, task: str, seed: int) -> None:
        """Call it after the env's own reset: the bot is made for that very grid."""
        del seed
        if task not in self._env.tasks or self._env.level is None:
            raise ConfigError(
                f"expert for {task!r}: reset its environment to one of {', '.join(self._env.tasks)} first"
            )
        self._bot = BabyAIBot(self._env.level)

    def act(self, observation: Observation) -> Array:
        if self._bot is None:
            raise RuntimeError("the expert was not told its task; call reset")
        taken = observation.previous_action
        action = np.zeros(len(ACTIONS), np.float32)
        try:
            choice = int(self._bot.replan(None if taken is None else int(taken.argmax())))
        except (AssertionError, AttributeError, DisappearedBoxError, IndexError, TypeError) as error:
            # All that the bot is known to raise when it has no plan: it asserts, and trips over what it did not find.
            self._env.give_up(f"the bot found no plan ({type(error).__name__}: {error})")
            choice = ACTIONS.index("done")
        action[choice] = 1.0
        return action


def _tables() -> tuple[Array, Array]:
    """(11, 7) one-hot kinds and (11, 2) flags (has a colour, has a state) by MiniGrid's object index.

    A floor counts as empty; goal, lava and agent do not occur in BabyAI's views and have no kind.
    """
    kinds = np.zeros((len(OBJECT_TO_IDX), len(_KINDS)), np.float32)
    flags = np.zeros((len(OBJECT_TO_IDX), 2), np.float32)
    for name, index in OBJECT_TO_IDX.items():
        kind = "empty" if name == "floor" else name
        if kind in _KINDS:
            kinds[index, _KINDS.index(kind)] = 1.0
        flags[index] = (kind in _COLOURED, kind == "door")
    return kinds, flags


_KIND_OF, _FLAGS_OF = _tables()
_COLOURS, _STATES = np.eye(len(COLOR_TO_IDX), dtype=np.float32), np.eye(len(STATE_TO_IDX), dtype=np.float32)


def _one_hot_view(image: Array) -> Array:
    """(7, 7, 3) uint8, indexed column first as MiniGrid does, to (784,) float32, row first."""
    kind, colour, state = np.moveaxis(image.swapaxes(0, 1).reshape(-1, 3), 1, 0)
    flags = _FLAGS_OF[kind]
    cells = np.concatenate((_KIND_OF[kind], _COLOURS[colour] * flags[:, :1], _STATES[state] * flags[:, 1:]), axis=1)
    return cells.reshape(-1)


def _check(tasks: Sequence[str], cameras: tuple[CameraSpec, ...], instructions: str) -> None:
    if not tasks or isinstance(tasks, str):
        raise ConfigError(f"tasks {tasks!r} must be a non-empty tuple of task names")
    unknown = [task for task in tasks if task not in TASK_STEPS]
    if unknown:
        raise ConfigError(f"unknown tasks {unknown}; choose among {', '.join(TASK_STEPS)}")
    if instructions != "training":
        raise ConfigError(f"instructions {instructions!r}: BabyAI words each mission in one way; use 'training'")
    for camera in cameras:
        if camera.name != CAMERA or camera.height != camera.width or camera.height % _VIEW:
            raise ConfigError(
                f"camera {camera.name!r} of {camera.height}x{camera.width}: BabyAI has {CAMERA!r}, "
                f"square, with a side that is a multiple of {_VIEW}"
            )
