"""The replay, its archive and the registry of a run."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vla_dist.registry.blobs import open_blobs
from vla_dist.registry.store import RedisPolicyRegistry
from vla_dist.replay.config import BufferConfig, Stratified, TableConfig, Uniform
from vla_dist.replay.limiter import LimiterConfig
from vla_dist.replay.shards import ShardedReplayTable, refuse_shards
from vla_dist.replay.sharing import ONLY_READER, Reader
from vla_dist.replay.table import RedisReplayTable
from vla_dist.run.composition.place import Place
from vla_dist.run.config import RunConfig

if TYPE_CHECKING:
    from vla_dist.replay.archive.archiver import Archiver


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


def lift_ratio(place: Place) -> None:
    """Let both sides go on without waiting for one another. Raises what ``override_limiter`` raises."""
    with contextlib.closing(build_table(place)) as table:
        table.override_limiter(LimiterConfig(min_steps=1, samples_per_insert=None))


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
