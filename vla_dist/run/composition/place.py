"""Where a run is, its environment and what its robots promise.

This folder is the one place that builds objects from config; everything else receives. Each function may be called in
any process of the run: connections are made where they are used, and what travels there is a ``Place``, nothing else.
Imports stand in the functions: a rollout process must not spend seconds and 300 MB on torch, nor a learner on MuJoCo.
"""

from __future__ import annotations

import subprocess
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla_dist.core.errors import ConfigError
from vla_dist.core.protocols import RobotEnv
from vla_dist.core.specs import EnvSpec
from vla_dist.run.config import RunConfig
from vla_dist.run.store import Store

if TYPE_CHECKING:
    from vla_dist.envs.instructions import Split


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a run keeps its things, as every process of it needs to know."""

    config: RunConfig
    run_id: str
    run_dir: Path
    redis_url: str
    images_url: str | None
    """Where frames of cameras lie; None: beside everything else."""
    spec: EnvSpec
    """Of the environment, so that only those who step it need its simulator."""
    shard_urls: tuple[str, ...] = ()
    shard_images_urls: tuple[str, ...] = ()
    """See ``Store``."""

    @classmethod
    def of(cls, config: RunConfig, run_dir: Path, store: Store, *, spec: EnvSpec | None = None) -> Place:
        return cls(
            config=config,
            run_id=run_dir.name,
            run_dir=run_dir,
            redis_url=store.redis_url,
            images_url=store.images_url,
            spec=spec or build_spec(config),
            shard_urls=store.shard_urls,
            shard_images_urls=store.shard_images_urls,
        )


def build_env(config: RunConfig, *, instructions: Split = "training") -> RobotEnv:
    from vla_dist.envs.make import make_env

    env = config.env
    if not env.has_simulator:
        raise ConfigError(
            f"a run of env.family {env.family} has no simulator; serve what it has learnt to its robots: vla-dist serve"
        )
    return make_env(
        env.family,
        tasks=env.tasks,
        cameras=env.cameras,
        max_episode_steps=env.max_episode_steps,
        instructions=instructions,
        layouts=env.layouts,
        shows_goal=env.shows_goal,
        shows_objects=env.shows_objects,
    )


def build_spec(config: RunConfig) -> EnvSpec:
    """Raises what the environment's constructor raises; of family recorded, what ``recorded_spec`` does."""
    if not config.env.has_simulator:
        from vla_dist.run.prior_data import recorded_spec

        return recorded_spec(config)
    env = build_env(config)
    try:
        return env.spec
    finally:
        env.close()


def public_settings(config: RunConfig) -> dict[str, Any]:
    """Plain JSON without secrets: what may lie beside weights on any storage, and go to a tracker."""
    replay = replace(config.replay, redis_url="", images_redis_url="")
    return asdict(replace(config, replay=replay, serving=replace(config.serving, token="")))


def git_revision() -> str:
    """Of the checkout this package runs from; empty for an installed one."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""
