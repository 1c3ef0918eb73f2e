"""What the branches of a run's settings ask of one another, said before anything starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vla_dist.core.errors import ConfigError
from vla_dist.core.seeding import ROLLOUT_LANES
from vla_dist.data.image_codec import ImageEncoding
from vla_dist.replay.config import Stratified
from vla_dist.replay.external import split_urls

if TYPE_CHECKING:
    from vla_dist.run.config import RunConfig


def require_consistent(config: RunConfig) -> None:
    """Raises ConfigError where one branch of a run's settings cannot go with another."""
    _require_simulator(config)
    if not config.env.tasks and config.env.has_simulator:
        raise ConfigError("env.tasks is empty; name at least one task")
    strangers = sorted(set(config.env.language_tasks) - set(config.env.tasks))
    if strangers:
        raise ConfigError(f"env.language_tasks {strangers} are not among env.tasks {list(config.env.tasks)}")
    if len(config.env.language_tasks) == 1:
        raise ConfigError(
            f"env.language_tasks names only {config.env.language_tasks[0]!r}; a wrong instruction needs a second "
            "task of the same scene. Name two or more, or none"
        )
    _require_counts(config)
    updates = config.learner.publish_updates
    if not updates or list(updates) != sorted(set(updates)) or updates[0] != 0:
        raise ConfigError(f"learner.publish_updates {updates} must start with 0 and increase")
    if updates[-1] != config.learner.total_updates:
        raise ConfigError(
            f"learner.publish_updates ends with {updates[-1]}, expected total_updates "
            f"{config.learner.total_updates}: the last version is the trained one"
        )
    if config.replay.min_steps > config.replay.capacity_steps:
        raise ConfigError(
            f"replay.min_steps {config.replay.min_steps} exceeds capacity_steps {config.replay.capacity_steps}: "
            "the learner would wait for ever; raise the capacity"
        )
    if not 1 <= config.rollout.policy_from_version <= len(updates):
        raise ConfigError(
            f"rollout.policy_from_version {config.rollout.policy_from_version} must be within 1 and {len(updates)}, "
            "the number of learner.publish_updates"
        )
    _require_enough_inserts(config)
    _require_servers(config)
    _require_encodings(config)
    _require_strata(config)


def _require_simulator(config: RunConfig) -> None:
    if config.env.has_simulator:
        return
    wanted = {
        "rollout.teacher": (config.rollout.teacher, "none"),
        "rollout.policy_episodes_per_task": (config.rollout.policy_episodes_per_task, 0),
        "fleet.num_robots": (config.fleet.num_robots, 0),
        "env.language_tasks": (config.env.language_tasks, ()),
        "env.cameras": (config.env.cameras, ()),
    }
    wrong = [f"{name} {got!r}, expected {expected!r}" for name, (got, expected) in wanted.items() if got != expected]
    if wrong:
        raise ConfigError(f"env.family {config.env.family} has nothing to simulate: {'; '.join(wrong)}")


def _require_servers(config: RunConfig) -> None:
    shards, images = len(split_urls(config.replay.redis_url)), len(split_urls(config.replay.images_redis_url))
    if images not in (0, 1, max(1, shards)):
        raise ConfigError(
            f"replay.images_redis_url names {images} servers, expected one, or {max(1, shards)} as "
            "replay.redis_url does"
        )


def _require_strata(config: RunConfig) -> None:
    if not config.replay.strata:
        return
    if len(split_urls(config.replay.redis_url)) > 1:
        raise ConfigError("replay.strata needs one server; leave it out, or give one replay.redis_url")
    Stratified(shares=config.replay.stratum_shares)


def _require_encodings(config: RunConfig) -> None:
    cameras = [camera.name for camera in config.env.cameras]
    for word in config.replay.image_encodings:
        camera, names_one, text = word.rpartition("=")
        ImageEncoding.parse(text)
        if names_one and camera not in cameras:
            raise ConfigError(
                f"replay.image_encodings {word!r} names a camera that the environment lacks; it has "
                f"{', '.join(cameras) or 'none'}"
            )


def _require_counts(config: RunConfig) -> None:
    """What would fail only minutes later, inside a component."""
    counts = {
        "rollout.num_workers": config.rollout.num_workers,
        "rollout.episodes_per_task": config.rollout.episodes_per_task,
        "rollout.policy_streams": config.rollout.policy_streams,
        "learner.num_workers": config.learner.num_workers,
        "learner.batch_size": config.learner.batch_size,
        "learner.updates_per_step": config.learner.updates_per_step,
        "learner.checkpoint_every_updates": config.learner.checkpoint_every_updates,
        "serving.num_replicas": config.serving.num_replicas,
        "evaluation.num_workers": config.evaluation.num_workers,
        "evaluation.num_envs": config.evaluation.num_envs,
        "evaluation.episodes_per_task": config.evaluation.episodes_per_task,
        "evaluation.final_episodes_per_task": config.evaluation.final_episodes_per_task,
    }
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"{name} {count} must be at least 1")
    streams = config.rollout.num_workers * config.rollout.policy_streams
    if streams > ROLLOUT_LANES:
        raise ConfigError(
            f"rollout.num_workers {config.rollout.num_workers} times rollout.policy_streams "
            f"{config.rollout.policy_streams} must be at most {ROLLOUT_LANES}: that many draw seeds of their own"
        )
    if config.fleet.num_robots < 0 or config.fleet.control_hz <= 0:
        raise ConfigError(
            f"fleet.num_robots {config.fleet.num_robots} must not be negative, fleet.control_hz "
            f"{config.fleet.control_hz} must be positive"
        )
    if config.learner.batch_size % config.learner.num_workers:
        raise ConfigError(
            f"learner.batch_size {config.learner.batch_size} does not divide over {config.learner.num_workers} learner "
            "workers; make it a multiple"
        )
    if config.learner.use_gpu and config.learner.num_workers > 1 and config.placement.learner_gpus < 1:
        raise ConfigError(
            f"placement.learner_gpus {config.placement.learner_gpus} would put several ranks on one GPU, which NCCL "
            "refuses; give 1, or one learner worker"
        )


def _require_enough_inserts(config: RunConfig) -> None:
    # Shortest episodes seen are some 25 steps; a quota below this can leave the learner waiting at the end.
    if config.rollout.archives or config.rollout.teacher == "none":
        return  # What they hold is counted when the run starts.
    replay, learner = config.replay, config.learner
    least = 10 * config.rollout.episodes_per_task * len(config.env.tasks)
    if replay.min_steps > least:
        raise ConfigError(
            f"replay.min_steps {replay.min_steps} may never be reached: {config.rollout.episodes_per_task} episodes "
            f"of {len(config.env.tasks)} tasks are asked for; lower it to {least} or collect more"
        )
    wanted = learner.total_updates * learner.batch_size
    if wanted > replay.samples_per_insert * least + replay.error_buffer_steps and config.fleet.num_robots == 0:
        raise ConfigError(
            f"{learner.total_updates} updates of {learner.batch_size} windows need {wanted} samples, more than "
            f"samples_per_insert {replay.samples_per_insert} allows for so few episodes; raise it"
        )
