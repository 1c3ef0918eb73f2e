"""What a replica serves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vla_dist.run.composition.learning import build_policy_loader
from vla_dist.run.composition.place import Place
from vla_dist.run.composition.stores import build_registry, build_table
from vla_dist.run.files import SHADOW_LOG

if TYPE_CHECKING:
    from vla_dist.serving.ingest import FleetIngest
    from vla_dist.serving.service import PolicyService


def build_services(place: Place, *, explores: bool = False) -> tuple[PolicyService, FleetIngest]:
    """What one serving replica runs; its versions are started. Blocking: until there is a first version.

    Args:
        explores: asks for what the learner wants to see tried, not for the best.
    """
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
    load = build_policy_loader(config, explores=explores)
    following = VersionsConfig(references=(config.reference,))
    versions = PolicyVersions(registry, load, following, wait_until_idle=batcher.wait_until_idle)
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
