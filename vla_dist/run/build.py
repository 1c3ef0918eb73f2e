"""The one place that builds objects from config; everything else receives.

Each function may be called in any process of the run: connections are made where they are used, and what travels
there is the config, the address of the store and nothing else.

Imports stand in the functions: a rollout process must not spend seconds and 300 MB on torch, nor a learner on MuJoCo.
"""

from __future__ import annotations

import subprocess
import uuid
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla_dist.core.errors import ConfigError
from vla_dist.core.protocols import PolicyLoader, PolicyRegistry, ReplayTable, RobotEnv, Worker
from vla_dist.core.specs import EnvSpec
from vla_dist.data.image_codec import ImageEncoding
from vla_dist.registry.blobs import open_blobs
from vla_dist.registry.store import RedisPolicyRegistry
from vla_dist.replay.config import BufferConfig, Stratified, TableConfig, Uniform
from vla_dist.replay.limiter import LimiterConfig
from vla_dist.replay.shards import ShardedReplayTable, refuse_shards
from vla_dist.replay.sharing import ONLY_READER, Reader
from vla_dist.replay.table import RedisReplayTable
from vla_dist.run.config import LearnerSettings, RunConfig
from vla_dist.run.files import SHADOW_LOG, SPOOLS
from vla_dist.run.phrases import phrase_source, training_phrases
from vla_dist.run.store import Store

if TYPE_CHECKING:
    from vla_dist.collection.campaign import Campaign
    from vla_dist.collection.ledger import CampaignLedger
    from vla_dist.envs.instructions import Split
    from vla_dist.evaluation.suite import VersionJudge
    from vla_dist.learner.algorithms.interventions import InterventionWeights
    from vla_dist.learner.config import Rank
    from vla_dist.learner.learner import Learner
    from vla_dist.learner.train_step import OptimiserConfig
    from vla_dist.models.member import PolicyModelConfig
    from vla_dist.replay.archive.archiver import Archiver
    from vla_dist.robot.simulated_robot import SimulatedRobot
    from vla_dist.rollout.worker import RolloutConfig, RolloutWorker
    from vla_dist.serving.ingest import FleetIngest
    from vla_dist.serving.service import PolicyService

_LEARNER_LANE = 10_000
"""First seed of draws by learner ranks: each rank, and each start of it, draws by a seed of its own."""
_CAMPAIGN_CAPACITY = 200_000
"""Steps that a campaign keeps in Redis; the archive has all of them, and eviction waits for it."""
_ROBOT_LANE = 512
"""First seed lane of robots: rollout workers own those below."""


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


def build_table(
    place: Place, *, seed: int = 0, context_steps: int = 1, future_steps: int = 0, reader: Reader = ONLY_READER
) -> RedisReplayTable | ShardedReplayTable:
    """Args:
    context_steps, future_steps: of the windows; only who samples need care.
    reader: which of those that share each batch.
    """
    config = replace(_buffer_config(place), context_steps=context_steps, future_steps=future_steps, reader=reader)
    if place.shard_urls:
        images_urls = place.shard_images_urls or None
        return ShardedReplayTable(place.shard_urls, place.spec, config, seed=seed, images_urls=images_urls)
    return _build_single_table(place, config, seed)


def _build_single_table(place: Place, config: BufferConfig, seed: int) -> RedisReplayTable:
    refuse_shards(place.redis_url, config.name)
    return RedisReplayTable(place.redis_url, place.spec, config, seed=seed, images_url=place.images_url)


def _buffer_config(place: Place) -> BufferConfig:
    replay = place.config.replay
    return BufferConfig(
        name=place.config.preset,
        num_steps=replay.segment_steps,
        capacity_steps=replay.capacity_steps,
        image_encodings={camera.name: replay.image_encoding(camera.name) for camera in place.spec.cameras},
        tables=(
            TableConfig(
                sampler=Stratified(shares=replay.stratum_shares) if replay.strata else Uniform(),
                limiter=LimiterConfig(
                    min_steps=replay.min_steps,
                    samples_per_insert=replay.samples_per_insert,
                    error_buffer_steps=replay.error_buffer_steps,
                ),
            ),
        ),
    )


def build_archivers(place: Place) -> list[Archiver]:
    """One for each server of a replay that is archived, all into one folder. Raises what ``Archiver`` raises."""
    from vla_dist.replay.archive.archiver import Archiver

    archive, table = place.config.replay.archive, build_table(place, seed=4000)
    shards = table.shards if isinstance(table, ShardedReplayTable) else (table,)
    return [Archiver(shard, archive if "://" in archive else place.run_dir / archive) for shard in shards]


def build_registry(place: Place) -> RedisPolicyRegistry:
    location = blobs_location(place.config, place.run_dir, place.redis_url)
    return RedisPolicyRegistry(place.redis_url, open_blobs(location))


def blobs_location(config: RunConfig, run_dir: Path, redis_url: str) -> str:
    """Where the tensors of a run's versions lie, as ``open_blobs`` takes it."""
    place = config.registry.blobs
    return place if "://" in place else str(run_dir / place) if place else redis_url


def build_rollout_worker(place: Place, worker_index: int, *, opened: ExitStack | None = None) -> list[Worker]:
    """Args:
    opened: takes what a process that goes on must close afterwards; None: it stays open.
    """
    from vla_dist.rollout.worker import RolloutConfig

    config = place.config
    rollout = RolloutConfig(
        run_id=place.run_id,
        tasks=config.env.tasks,
        num_workers=config.rollout.num_workers,
        episodes_per_task=config.rollout.episodes_per_task,
        noise_scales=config.rollout.noise_scales,
        segment_steps=config.replay.segment_steps,
        seed=config.seed,
        seeds=config.rollout.seeds,
    )
    table = build_table(place, seed=worker_index)
    if opened is not None:
        opened.callback(table.close)
    workers: list[Worker] = []
    if config.rollout.archives:
        workers.append(_build_archived_episodes(place, worker_index))
    if config.rollout.teacher != "none":
        workers.append(_build_teacher_rollout(place, rollout, table, worker_index))
    if config.rollout.policy_episodes_per_task:
        workers.append(_build_policy_rollout(place, rollout, table, worker_index))
    return workers


def _build_archived_episodes(place: Place, worker_index: int) -> Worker:
    from vla_dist.replay.archive.filling import ArchivedEpisodes

    mine = place.config.rollout.archives[worker_index :: place.config.rollout.num_workers]
    return ArchivedEpisodes(build_table(place, seed=worker_index), mine)


def _build_teacher_rollout(
    place: Place, rollout: RolloutConfig, table: ReplayTable, worker_index: int
) -> RolloutWorker:
    from vla_dist.envs.make import make_expert
    from vla_dist.rollout.behaviour import NoisyExpert, RandomActions
    from vla_dist.rollout.worker import RolloutWorker

    env = build_env(place.config)
    teacher = (
        RandomActions(env.spec)
        if place.config.rollout.teacher == "random"
        else NoisyExpert(make_expert(env), env.spec, noise_scales=rollout.noise_scales)
    )
    return RolloutWorker(env, teacher, table, rollout, worker_index=worker_index)


def _build_policy_rollout(place: Place, expert: RolloutConfig, table: ReplayTable, worker_index: int) -> RolloutWorker:
    from vla_dist.rollout.behaviour import FollowedPolicy
    from vla_dist.rollout.worker import RolloutWorker

    rollout = replace(
        expert,
        run_id=f"{place.run_id}-policy",
        episodes_per_task=place.config.rollout.policy_episodes_per_task,
        seed=place.config.seed + 1,
        seeds=(),
    )
    load = build_policy_loader(place.config, explores=True)
    behaviour = FollowedPolicy(build_registry(place), place.config.reference, load)
    return RolloutWorker(build_env(place.config), behaviour, table, rollout, worker_index=worker_index)


def build_model_config(config: RunConfig, spec: EnvSpec) -> PolicyModelConfig:
    """Raises ConfigError on a member, size or setting that does not exist, or that the robot's spec or the learner's
    algorithm does not allow.
    """
    from vla_dist.learner.algorithms.catalogue import algorithm_for, make_algorithm
    from vla_dist.models.settings import parse_changes
    from vla_dist.models.zoo import architecture

    member = architecture(config.model.architecture)
    model = member.configure(config.model.preset, spec, **parse_changes(member.config, config.model_changes))
    learner, conditioning = config.learner, config.model.conditioning
    name = learner.algorithm or algorithm_for(model, conditioning)
    make_algorithm(name, learner.algorithm_changes, model=model, conditioning=conditioning)
    _build_intervention_weights(learner)
    _build_optimiser(learner)
    if learner.part_learning_rates:
        _require_parts(learner, member.model, model)
    return model


def _require_parts(settings: LearnerSettings, build: Any, model: PolicyModelConfig) -> None:
    import torch

    from vla_dist.learner.part_rates import parse_part_rates, require_parts

    with torch.device("meta"):
        trained = [name for name, p in build(model).named_parameters() if p.requires_grad]
    require_parts(parse_part_rates(settings.part_learning_rates), trained)


def _build_optimiser(settings: LearnerSettings) -> OptimiserConfig:
    from vla_dist.learner.train_step import OptimiserConfig

    warmup = settings.warmup_updates
    return OptimiserConfig(
        total_updates=settings.total_updates,
        learning_rate=settings.learning_rate,
        part_learning_rates=settings.part_learning_rates,
        final_fraction=settings.final_learning_rate_fraction,
        warmup_updates=min(100, settings.total_updates // 10) if warmup is None else warmup,
        weight_decay=settings.weight_decay,
        gradient_clip=settings.gradient_clip,
        ema_decay=settings.ema_decay,
        num_micro_batches=settings.num_micro_batches,
        precision=settings.precision,
        compile=settings.compile,
    )


def _build_intervention_weights(settings: LearnerSettings) -> InterventionWeights | None:
    from vla_dist.learner.algorithms.interventions import InterventionWeights

    if not settings.intervention_share:
        return None
    return InterventionWeights(share=settings.intervention_share, before_steps=settings.steps_before_takeover)


def build_policy_loader(config: RunConfig, *, explores: bool = False) -> PolicyLoader:
    """From an artifact to the policy that is executed, the same wherever it acts.

    Args:
        explores: asks for what the learner wants to see tried, not for the best.
    """
    from vla_dist.models.auto import build_executed_policy

    return partial(build_executed_policy, execution=config.model.execution, explores=explores)


def build_learner(
    place: Place, rank: Rank, *, registry: PolicyRegistry | None = None, opened: ExitStack | None = None
) -> Learner:
    """Args:
    registry: that versions go to; None: the run's.
    opened: takes what a process that goes on must close afterwards; None: it stays open.
    """
    from vla_dist.learner.config import LearnerConfig
    from vla_dist.learner.learner import Learner
    from vla_dist.models.language_encoder import shared_embedder
    from vla_dist.models.zoo import architecture

    config = place.config
    spec, settings, learner = place.spec, config.model, config.learner
    model_config = build_model_config(config, spec)
    interventions = _build_intervention_weights(learner)
    learner_config = LearnerConfig(
        policy_name=config.preset,
        run_id=place.run_id,
        optimiser=_build_optimiser(learner),
        batch_size=learner.batch_size // learner.num_workers,
        updates_per_step=learner.updates_per_step,
        publish_updates=learner.publish_updates,
        checkpoint_every=learner.checkpoint_every_updates,
        algorithm=learner.algorithm,
        algorithm_changes=learner.algorithm_changes,
        interventions=interventions,
        conditioning=settings.conditioning,
        target_quantile=settings.target_quantile,
        min_episodes=2 * len(config.env.tasks),
        sample_timeout_s=learner.sample_timeout_s,
        seed=config.seed,
    )
    table = build_table(
        place,
        seed=_LEARNER_LANE + rank.index + config.learner.num_workers * rank.first_update,
        context_steps=model_config.context_steps,
        future_steps=max(model_config.horizon - 1, interventions.before_steps if interventions else 0),
        reader=Reader(index=rank.index, num=config.learner.num_workers),
    )
    if opened is not None:
        opened.callback(table.close)
    return Learner(
        learner_config,
        model=architecture(settings.architecture).model(model_config),
        spec=spec,
        table=table,
        registry=registry or build_registry(place),
        embed=shared_embedder().embed,
        phrases=training_phrases(config),
        git_revision=git_revision(),
        run_config=public_settings(config),
        rank=rank,
    )


def public_settings(config: RunConfig) -> dict[str, Any]:
    """Plain JSON without secrets: what may lie beside weights on any storage, and go to a tracker."""
    replay = replace(config.replay, redis_url="", images_redis_url="")
    return asdict(replace(config, replay=replay, serving=replace(config.serving, token="")))


def build_services(place: Place) -> tuple[PolicyService, FleetIngest]:
    """What one serving replica runs; its versions are started. Blocking: until there is a first version."""
    from vla_dist.registry.canaries import RedisCanaries
    from vla_dist.registry.promotion import Promotion
    from vla_dist.serving.assignment import ChannelAssignment
    from vla_dist.serving.batcher import BatcherConfig, DeadlineBatcher
    from vla_dist.serving.event_log import EventLog
    from vla_dist.serving.ingest import FleetIngest, IngestConfig
    from vla_dist.serving.quarantine import QuarantineFolder
    from vla_dist.serving.service import PolicyService
    from vla_dist.serving.service_config import ServiceConfig
    from vla_dist.serving.versions import PolicyVersions, VersionsConfig

    config = place.config
    batcher = DeadlineBatcher(BatcherConfig())
    registry = build_registry(place)
    registry.follow(config.reference, after=0, timeout_s=config.serving.startup_timeout_s)
    versions = PolicyVersions(registry, build_policy_loader(config), VersionsConfig(references=(config.reference,)))
    versions.start()
    canaries = RedisCanaries(place.redis_url)
    ingest = FleetIngest(
        build_table(place, seed=2000),
        place.spec,
        IngestConfig(num_steps=config.replay.segment_steps),
        quarantine=QuarantineFolder(place.run_dir / "quarantine"),
    )
    service = PolicyService(
        versions,
        batcher,
        ServiceConfig(),
        key=canaries.service_key(),
        assignment=ChannelAssignment(versions, canaries).start(),
        shadow_log=EventLog(place.run_dir / SHADOW_LOG),
        moves=Promotion(registry, canaries),
    )
    return service, ingest


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
        robots.append(SimulatedRobot(env, client, control, robot, robot_index=_ROBOT_LANE + index, spool=spool))
    return robots


def build_campaign_spec(campaign: Campaign, folder: Path) -> EnvSpec:
    """The contract of a campaign's robots; ``folder`` is that of its file. Raises ConfigError, NotFound."""
    if campaign.contract:
        return campaign.spec_from_contract(folder)
    from vla_dist.envs.make import make_env

    env = make_env(
        campaign.environment,
        tasks=campaign.tasks,
        cameras=campaign.cameras,
        max_episode_steps=campaign.max_episode_steps,
    )
    try:
        return env.spec
    finally:
        env.close()


def build_campaign_table(campaign: Campaign, spec: EnvSpec, redis_url: str, *, seed: int = 0) -> RedisReplayTable:
    """A table that never makes a robot wait for a reader: what is collected goes to the archive."""
    encoding = f"jpeg:{campaign.jpeg_quality}" if campaign.jpeg_quality else "lz4"
    config = BufferConfig(
        name=campaign.name,
        num_steps=campaign.segment_steps,
        capacity_steps=_CAMPAIGN_CAPACITY + 2 * spec.max_episode_steps,
        image_encodings={camera.name: ImageEncoding.parse(encoding) for camera in spec.cameras},
    )
    return RedisReplayTable(redis_url, spec, config, seed=seed)


def build_campaign_ingest(
    campaign: Campaign, table: RedisReplayTable, *, ledger: CampaignLedger, quarantine: Path
) -> FleetIngest:
    from vla_dist.serving.ingest import FleetIngest, IngestConfig
    from vla_dist.serving.quarantine import QuarantineFolder

    return FleetIngest(
        table,
        table.spec,
        IngestConfig(num_steps=campaign.segment_steps, tasks=campaign.tasks),
        quarantine=QuarantineFolder(quarantine),
        ledger=ledger,
        packed=table if campaign.jpeg_quality and table.spec.cameras else None,
    )


def build_judge(place: Place, *, instructions: Split = "training") -> VersionJudge:
    from vla_dist.evaluation.suite import Evaluator, VersionJudge

    config = place.config
    envs = [build_env(config, instructions=instructions) for _ in range(config.evaluation.num_envs)]
    evaluator = Evaluator(envs, phrase_source(config, instructions))
    return VersionJudge(build_registry(place), build_policy_loader(config), evaluator, config.preset)


def git_revision() -> str:
    """Of the checkout this package runs from; empty for an installed one."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""
