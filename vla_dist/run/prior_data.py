"""Archives that a run learns from: found, compared with its contract and counted before anything starts."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

from vla_dist.core.errors import ConfigError, ContractMismatch, NotFound
from vla_dist.core.specs import EnvSpec
from vla_dist.replay.archive.folder import ArchiveFolder
from vla_dist.replay.archive.parquet import EVERYTHING
from vla_dist.replay.archive.part_reader import PartReader
from vla_dist.replay.archive.parts import wanted_row_groups
from vla_dist.run.config import RunConfig
from vla_dist.run.files import archive_in


def settle_archives(config: RunConfig, spec: EnvSpec) -> RunConfig:
    """The config with its archives as places that every process finds, once it is known that they can be learnt from.

    Raises:
        NotFound: an archive is not there, or holds nothing.
        ContractMismatch: episodes of another contract than the run's; the message lists every difference.
        ConfigError: episodes of another T, a task that no episode has, or too few steps.
    """
    if not config.rollout.archives:
        if config.rollout.teacher == "none":
            raise ConfigError("rollout.teacher none leaves nothing to learn from; name rollout.archives, or a teacher")
        return config
    places = tuple(_place(one) for one in config.rollout.archives)
    steps = Counter[str]()
    for place in places:
        steps += _count(config, place, spec)
    _require_enough(config, min(steps.total(), config.replay.capacity_steps))
    env = config.env if config.env.tasks else replace(config.env, tasks=tuple(sorted(steps)))
    strangers = sorted(set(env.tasks) - set(steps)) if not env.has_simulator else []
    if strangers:
        raise ConfigError(f"env.tasks {strangers} are in none of the archives; they hold {', '.join(sorted(steps))}")
    return replace(config, env=env, rollout=replace(config.rollout, archives=places))


def recorded_spec(config: RunConfig) -> EnvSpec:
    """The contract of the first archive. Raises NotFound, ConfigError, IntegrityError."""
    if not config.rollout.archives:
        raise ConfigError("env.family recorded takes its contract from rollout.archives; name one, or several")
    folder = ArchiveFolder.at(_place(config.rollout.archives[0]))
    names = folder.part_names()
    if not names:
        raise NotFound(f"archive {folder.name} holds no episode; is the path right?")
    with PartReader(folder, names[0]) as part:
        return part.header.spec


def _place(archive: str) -> str:
    return archive if "://" in archive else str(Path(archive_in(archive)).resolve())


def _count(config: RunConfig, place: str, spec: EnvSpec) -> Counter[str]:
    """Steps of one archive by task."""
    steps = Counter[str]()
    folder = ArchiveFolder.at(place)
    for part, _, episodes in wanted_row_groups(folder, EVERYTHING, "raise"):
        differences = spec.differences(part.header.spec)
        if differences:
            raise ContractMismatch(
                f"the run's contract ({spec.name}) differs from that of archive {place} ({part.header.spec.name}): "
                f"{'; '.join(differences)}. Give the run the archive's settings (env.*), or another archive"
            )
        if part.header.num_steps != config.replay.segment_steps:
            raise ConfigError(
                f"archive {place} has segments of {part.header.num_steps} steps, the run's replay of "
                f"{config.replay.segment_steps}; give --replay.segment-steps {part.header.num_steps}"
            )
        for episode in episodes:
            steps[episode.task] += episode.length
    if not steps:
        raise NotFound(f"archive {place} holds no episode; is the path right?")
    return steps


def _require_enough(config: RunConfig, archived: int) -> None:
    """With robots or a teacher beside the archives more is to come, so that nothing is refused then."""
    if config.rollout.teacher != "none" or config.fleet.num_robots or config.rollout.policy_episodes_per_task:
        return
    replay, learner = config.replay, config.learner
    if archived < replay.min_steps:
        raise ConfigError(
            f"the archives hold {archived:,} steps that fit, and sampling begins with {replay.min_steps:,}; give "
            f"--replay.min-steps {archived}"
        )
    wanted = learner.total_updates * learner.batch_size
    if wanted > replay.samples_per_insert * archived + replay.error_buffer_steps:
        least = -(-(wanted - replay.error_buffer_steps) // archived)
        raise ConfigError(
            f"{learner.total_updates} updates of {learner.batch_size} windows need {wanted:,} samples, more than "
            f"samples_per_insert {replay.samples_per_insert:g} allows for the {archived:,} steps of the archives; give "
            f"--replay.samples-per-insert {least:.0f}, or fewer updates"
        )
