"""What a collection campaign needs in the place of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vla_dist.core.specs import EnvSpec
from vla_dist.data.image_codec import ImageEncoding
from vla_dist.replay.config import BufferConfig
from vla_dist.replay.table import RedisReplayTable

if TYPE_CHECKING:
    from vla_dist.collection.campaign import Campaign
    from vla_dist.collection.ledger import CampaignLedger
    from vla_dist.serving.ingest import FleetIngest

_CAMPAIGN_CAPACITY = 200_000
"""Steps that a campaign keeps in Redis; the archive has all of them, and eviction waits for it."""


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
