"""Who acts in environments: rollout workers, simulated robots, judges."""

from __future__ import annotations

import uuid
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from vla_dist.core.protocols import ReplayTable, Worker
from vla_dist.core.seeding import ROLLOUT_LANES
from vla_dist.core.specs import EnvSpec
from vla_dist.run.composition.learning import build_policy_loader
from vla_dist.run.composition.place import Place, build_env
from vla_dist.run.composition.stores import build_registry, build_table
from vla_dist.run.files import SPOOLS
from vla_dist.run.phrases import phrase_source

if TYPE_CHECKING:
    from vla_dist.envs.instructions import Split
    from vla_dist.evaluation.suite import VersionJudge
    from vla_dist.robot.simulated_robot import SimulatedRobot
    from vla_dist.rollout.behaviour import Behaviour
    from vla_dist.rollout.worker import RolloutConfig, RolloutWorker


def build_rollout_worker(
    place: Place, worker_index: int, *, opened: ExitStack | None = None, served_at: str = ""
) -> list[Worker]:
    """Args:
    opened: takes what a process that goes on must close afterwards; None: it stays open.
    served_at: address of the policy service that executes the run's own versions, there already or soon; empty: the
        workers load them from the registry.
    """
    config = place.config
    table = build_table(place, seed=worker_index)
    if opened is not None:
        opened.callback(table.close)
    workers: list[Worker] = []
    if config.rollout.archives:
        workers.append(_build_archived_episodes(place, worker_index))
    if config.rollout.teacher != "none":
        workers.append(_build_teacher_rollout(place, table, worker_index))
    if config.rollout.policy_episodes_per_task:
        streams = config.rollout.policy_streams
        indices = range(worker_index * streams, (worker_index + 1) * streams)
        workers += [_build_policy_rollout(place, table, index, served_at) for index in indices]
    return workers


def _build_archived_episodes(place: Place, worker_index: int) -> Worker:
    from vla_dist.replay.archive.filling import ArchivedEpisodes

    mine = place.config.rollout.archives[worker_index :: place.config.rollout.num_workers]
    return ArchivedEpisodes(build_table(place, seed=worker_index), mine)


def teacher_episodes(place: Place) -> RolloutConfig:
    """What the teacher shows."""
    from vla_dist.rollout.worker import RolloutConfig

    config = place.config
    return RolloutConfig(
        run_id=place.run_id,
        tasks=config.env.tasks,
        num_workers=config.rollout.num_workers,
        episodes_per_task=config.rollout.episodes_per_task,
        noise_scales=config.rollout.noise_scales,
        segment_steps=config.replay.segment_steps,
        seed=config.seed,
        seeds=config.rollout.seeds,
    )


def policy_episodes(place: Place) -> RolloutConfig:
    """What the policy itself tries."""
    settings = place.config.rollout
    return replace(
        teacher_episodes(place),
        run_id=f"{place.run_id}-policy",
        num_workers=settings.num_workers * settings.policy_streams,
        episodes_per_task=settings.policy_episodes_per_task,
        seed=place.config.seed + 1,
        seeds=settings.seeds if settings.teacher == "none" else (),
    )


def _build_teacher_rollout(place: Place, table: ReplayTable, worker_index: int) -> RolloutWorker:
    from vla_dist.envs.make import make_expert
    from vla_dist.rollout.behaviour import NoisyExpert, RandomActions
    from vla_dist.rollout.worker import RolloutWorker

    rollout = teacher_episodes(place)
    env = build_env(place.config)
    teacher = (
        RandomActions(env.spec)
        if place.config.rollout.teacher == "random"
        else NoisyExpert(make_expert(env), env.spec, noise_scales=rollout.noise_scales)
    )
    return RolloutWorker(env, teacher, table, rollout, worker_index=worker_index)


def _build_policy_rollout(place: Place, table: ReplayTable, stream: int, served_at: str) -> RolloutWorker:
    """Args:
    stream: of all those of all workers.
    """
    from vla_dist.rollout.worker import RolloutWorker

    env = build_env(place.config)
    behaviour = _build_served_policy(place, env.spec, stream, served_at) if served_at else _build_followed_policy(place)
    return RolloutWorker(env, behaviour, table, policy_episodes(place), worker_index=stream)


def _build_followed_policy(place: Place) -> Behaviour:
    from vla_dist.rollout.behaviour import FollowedPolicy

    load = build_policy_loader(place.config, explores=place.config.rollout.policy_explores)
    first = place.config.rollout.policy_from_version
    return FollowedPolicy(build_registry(place), place.config.reference, load, first_version=first)


def _build_served_policy(place: Place, spec: EnvSpec, stream: int, address: str) -> Behaviour:
    from vla_dist.robot.client import PolicyClient
    from vla_dist.rollout.behaviour import ServedPolicy

    client = PolicyClient(address, token=place.config.serving.token or None)
    robot_id = f"rollout-{stream}"
    return ServedPolicy(
        lambda task: client.open_session(spec, policy=place.config.reference, robot_id=robot_id, task=task),
        first_version=place.config.rollout.policy_from_version,
    )


def build_robots(place: Place, address: str) -> list[SimulatedRobot]:
    """The simulated fleet of one process: each robot with its own connection and environment."""
    from vla_dist.robot.client import PolicyClient
    from vla_dist.robot.control_loop import ControlConfig
    from vla_dist.robot.fleet_client import FleetClient
    from vla_dist.robot.simulated_robot import SimulatedRobot, SimulatedRobotConfig
    from vla_dist.robot.spool import Spool
    from vla_dist.robot.uploader import SpoolUploader

    config = place.config
    # A fleet that was killed and started again runs new episodes, so they need new names.
    incarnation = uuid.uuid4().hex[:8]
    robots = []
    for index in range(config.fleet.num_robots):
        env = build_env(config)
        client = PolicyClient(address, token=config.serving.token or None)
        control = ControlConfig(
            policy=config.reference,
            robot_id=f"robot-{index}",
            control_hz=config.fleet.control_hz,
            waits=True,
            segment_steps=config.replay.segment_steps,
        )
        tasks = config.env.tasks[index:] + config.env.tasks[:index]
        robot = SimulatedRobotConfig(tasks=tasks, run_id=f"{place.run_id}-{incarnation}", seed=config.seed)
        spool = Spool(place.run_dir / SPOOLS / control.robot_id)
        SpoolUploader(FleetClient(client, robot_id=control.robot_id, spool_id=spool.spool_id), spool)
        robots.append(SimulatedRobot(env, client, control, robot, robot_index=ROLLOUT_LANES + index, spool=spool))
    return robots


def build_judge(place: Place, *, instructions: Split = "training") -> VersionJudge:
    from vla_dist.evaluation.suite import Evaluator, VersionJudge

    config = place.config
    envs = [build_env(config, instructions=instructions) for _ in range(config.evaluation.num_envs)]
    evaluator = Evaluator(envs, phrase_source(config, instructions))
    return VersionJudge(build_registry(place), build_policy_loader(config), evaluator, config.preset)
