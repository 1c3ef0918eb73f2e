"""Simulators as robots: the environment, and who can act in it beside a policy."""

from collections.abc import Mapping

from vla_dist.core.errors import ConfigError
from vla_dist.core.protocols import RobotEnv
from vla_dist.core.specs import CameraSpec
from vla_dist.core.types import Source
from vla_dist.robot.collector import Actor

_FAMILIES = ("metaworld", "babyai", "t-maze", "key-to-door")
_GYMNASIUM = "gymnasium:"


def is_simulator(name: str) -> bool:
    """Whether a driver's name is one of the simulators that come with the package."""
    return name in _FAMILIES or name.startswith(_GYMNASIUM)


def build_simulator(
    name: str,
    *,
    tasks: tuple[str, ...],
    cameras: tuple[CameraSpec, ...] = (),
    max_episode_steps: int | None = None,
    noise: float = 0.0,
) -> tuple[RobotEnv, Mapping[Source, Actor]]:
    """The robot, and its scripted expert where it has one.

    Args:
        tasks: that it can do; empty: every one of the simulator.

    Raises:
        ConfigError: an unknown name or task.
        ResourceMissing: the simulator is not installed.
    """
    from vla_dist.envs.make import every_task, make_env, make_expert
    from vla_dist.rollout.behaviour import NoisyExpert

    env = make_env(name, tasks=tasks or every_task(name), cameras=cameras, max_episode_steps=max_episode_steps)
    actors: dict[Source, Actor] = {}
    try:
        actors["expert"] = NoisyExpert(make_expert(env), env.spec, noise_scales=(noise,))
    except ConfigError:
        # A plain Gymnasium task: only policies and people act in it.
        return env, {}
    return env, actors


def parse_cameras(words: tuple[str, ...]) -> tuple[CameraSpec, ...]:
    """``NAME=HEIGHTxWIDTH`` each. Raises ConfigError."""
    cameras = []
    for word in words:
        name, _, size = word.partition("=")
        height, _, width = size.partition("x")
        if not name or not height.isdigit() or not width.isdigit():
            raise ConfigError(f"camera {word!r} must be written NAME=HEIGHTxWIDTH, for example table=128x128")
        cameras.append(CameraSpec(name=name, height=int(height), width=int(width)))
    return tuple(cameras)
