"""Environments and experts by name: the one door into this room."""

import contextlib
import difflib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from vla_dist.core.errors import ConfigError, ResourceMissing
from vla_dist.core.protocols import Expert, RobotEnv
from vla_dist.core.specs import CameraSpec
from vla_dist.envs.instructions import WORDED_TASKS, Split
from vla_dist.envs.key_to_door import TASKS as KEY_TO_DOOR_TASKS
from vla_dist.envs.key_to_door import KeyToDoorEnv, KeyToDoorExpert
from vla_dist.envs.layout_split import SplitLayouts
from vla_dist.envs.t_maze import TMazeEnv, TMazeExpert

FAMILIES = ("metaworld", "babyai", "t-maze", "key-to-door", "gymnasium:<id>")
Layouts = Literal["any", "split"]
_GYMNASIUM = "gymnasium:"
_SIMULATOR_PACKAGES = frozenset({"gymnasium", "metaworld", "minigrid", "mujoco", "imageio", "glfw", "OpenGL"})


def make_env(
    name: str,
    *,
    tasks: Sequence[str] = (),
    cameras: tuple[CameraSpec, ...] = (),
    max_episode_steps: int | None = None,
    instructions: Split = "training",
    layouts: Layouts = "any",
    shows_goal: bool = False,
    shows_objects: bool = True,
) -> RobotEnv:
    """Build an environment.

    Args:
        name: its family: ``metaworld``, ``babyai``, ``t-maze``, ``key-to-door``, or ``gymnasium:<id>``, for example
            ``gymnasium:Pendulum-v1``.
        tasks: those that ``reset`` will accept; a Gymnasium id is its own only task and needs none.
        cameras: images in each observation; none means state alone, which needs no graphics library.
        max_episode_steps: None takes the family's own (200 for ``metaworld``).
        instructions: the split of phrases that a seed chooses from.
        layouts: ``split``: no evaluation seed begins an episode as a training seed may, see ``SplitLayouts``.
        shows_goal: whether proprio holds the goal's place, of ``metaworld`` alone.
        shows_objects: whether proprio holds the objects' places, of ``metaworld`` alone; else a camera must see them.

    Raises:
        ConfigError: an unknown name, with the nearest ones, or settings the family cannot have.
        ResourceMissing: the simulator's package is not installed.
    """
    options: dict[str, Any] = {"cameras": cameras, "instructions": instructions}
    if max_episode_steps is not None:
        options["max_episode_steps"] = max_episode_steps
    if shows_goal:
        if name != "metaworld":
            raise ConfigError(f"environment {name!r} has no goal to show; leave shows_goal out")
        options["shows_goal"] = True
    if not shows_objects:
        if name != "metaworld" or not cameras:
            raise ConfigError(
                f"environment {name!r} with {len(cameras)} cameras cannot hide its objects; only metaworld can, with a "
                "camera to see them"
            )
        options["shows_objects"] = False
    env = _make(name, tuple(tasks), options)
    if layouts == "any":
        return env
    if isinstance(env, TMazeEnv):
        raise ConfigError("the layouts of a T-maze are its lengths; tell them apart by tasks, not by layouts='split'")
    simulated: Any = env
    return SplitLayouts(env, layout=None if shows_objects else simulated.full_observation)


def _make(name: str, tasks: tuple[str, ...], options: dict[str, Any]) -> RobotEnv:
    with _missing_simulator(name):
        if name == "metaworld":
            from vla_dist.envs.metaworld import MetaWorldEnv

            return MetaWorldEnv(tasks, **options)
        if name == "babyai":
            from vla_dist.envs.babyai import BabyAIEnv

            return BabyAIEnv(tasks, **options)
        if name == "t-maze":
            return TMazeEnv(tasks, **options)
        if name == "key-to-door":
            return KeyToDoorEnv(tasks, **options)
        if name.startswith(_GYMNASIUM):
            from vla_dist.envs.gymnasium_env import GymnasiumEnv

            return GymnasiumEnv(name.removeprefix(_GYMNASIUM), tasks, **options)
    near = difflib.get_close_matches(name, FAMILIES, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ConfigError(f"unknown environment {name!r}; {hint}The families are {', '.join(FAMILIES)}")


def every_task(name: str) -> tuple[str, ...]:
    """All tasks of a family; of a Gymnasium id, or of an unknown name, none, which ``make_env`` takes or refuses.

    Raises:
        ConfigError: a family whose tasks have no end.
        ResourceMissing: the simulator's package is not installed.
    """
    if name == "t-maze":
        raise ConfigError("t-maze has mazes of any length; say which, for example length-5-30")
    if name == "key-to-door":
        return tuple(KEY_TO_DOOR_TASKS)
    if name == "metaworld":
        return WORDED_TASKS
    if name == "babyai":
        with _missing_simulator(name):
            from vla_dist.envs.babyai import TASK_STEPS

            return tuple(TASK_STEPS)
    return ()


def make_expert(env: RobotEnv) -> Expert:
    """The scripted teacher of an environment built by ``make_env``.

    Raises:
        ConfigError: the environment has none.
    """
    if isinstance(env, SplitLayouts):
        return make_expert(env.inner)
    if isinstance(env, TMazeEnv):
        return TMazeExpert(env)
    if isinstance(env, KeyToDoorEnv):
        return KeyToDoorExpert(env)
    # An environment's class is only looked for where its module, and with it its simulator, is loaded already.
    simulated: Any = env
    metaworld, babyai = (sys.modules.get(f"vla_dist.envs.{module}") for module in ("metaworld", "babyai"))
    if metaworld is not None and isinstance(env, metaworld.MetaWorldEnv):
        from vla_dist.envs.experts import MetaWorldExpert

        return MetaWorldExpert(simulated)
    if babyai is not None and isinstance(env, babyai.BabyAIEnv):
        return babyai.BabyAIExpert(simulated)
    raise ConfigError(
        f"{type(env).__name__} has no scripted expert; MetaWorldEnv, BabyAIEnv, TMazeEnv and KeyToDoorEnv have one"
    )


@contextlib.contextmanager
def _missing_simulator(name: str) -> Iterator[None]:
    """A simulator that is not installed becomes ResourceMissing, any other missing module stays what it is."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _SIMULATOR_PACKAGES:
            raise
        raise ResourceMissing(
            f"environment {name!r} needs the package {package!r}, which is missing: pip install 'vla-dist[sim]'"
        ) from error
