"""Environments and experts by name: the one door into this room."""

import difflib
import sys
from collections.abc import Sequence
from typing import Any, Literal

from vla_dist.core.errors import ConfigError, ResourceMissing
from vla_dist.core.protocols import Expert, RobotEnv
from vla_dist.core.specs import CameraSpec
from vla_dist.envs.instructions import Split
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
    env = _make(name, tuple(tasks), options)
    if layouts == "any":
        return env
    if isinstance(env, TMazeEnv):
        raise ConfigError("the layouts of a T-maze are its lengths; tell them apart by tasks, not by layouts='split'")
    return SplitLayouts(env)


def _make(name: str, tasks: tuple[str, ...], options: dict[str, Any]) -> RobotEnv:
    try:
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
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _SIMULATOR_PACKAGES:
            raise
        raise ResourceMissing(
            f"environment {name!r} needs the package {package!r}, which is missing: pip install 'vla-dist[sim]'"
        ) from error
    near = difflib.get_close_matches(name, FAMILIES, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ConfigError(f"unknown environment {name!r}; {hint}The families are {', '.join(FAMILIES)}")


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
