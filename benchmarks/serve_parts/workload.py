"""What every server of the benchmark serves: one small, untrained Decision Transformer from one registry."""

import numpy as np

NAME = "bench"
REFERENCE = f"{NAME}@stable"
INSTRUCTION = "go"
BUCKETS = (1, 2, 4, 8, 16, 32)


def build_services(redis_url: str, *, device: str = "cpu", admission=None):
    from functools import partial

    from vla_dist.envs.metaworld import tabletop_spec
    from vla_dist.models.auto import build_policy
    from vla_dist.registry.blobs import RedisBlobs
    from vla_dist.registry.store import RedisPolicyRegistry
    from vla_dist.replay.config import BufferConfig
    from vla_dist.replay.table import RedisReplayTable
    from vla_dist.serving.batcher import BatcherConfig, DeadlineBatcher
    from vla_dist.serving.ingest import FleetIngest, IngestConfig
    from vla_dist.serving.service import PolicyService
    from vla_dist.serving.service_config import ServiceConfig
    from vla_dist.serving.versions import PolicyVersions, VersionsConfig

    registry = RedisPolicyRegistry(redis_url, RedisBlobs(redis_url))
    config = VersionsConfig(references=(REFERENCE,), warm_up_sizes=BUCKETS)
    batcher = DeadlineBatcher(BatcherConfig(bucket_sizes=BUCKETS))
    load = partial(build_policy, device=device)
    versions = PolicyVersions(registry, load, config, wait_until_idle=batcher.wait_until_idle)
    versions.start()
    table = RedisReplayTable(redis_url, tabletop_spec(), BufferConfig(name=NAME))
    return PolicyService(versions, batcher, admission or ServiceConfig()), FleetIngest(
        table, tabletop_spec(), IngestConfig()
    )


def registry_of(redis_url: str):
    from vla_dist.registry.blobs import RedisBlobs
    from vla_dist.registry.store import RedisPolicyRegistry

    return RedisPolicyRegistry(redis_url, RedisBlobs(redis_url))


def make_artifact(seed: int):
    """The small Decision Transformer of the demo, with weights by seed."""
    import torch

    from vla_dist.envs.metaworld import tabletop_spec
    from vla_dist.models import auto
    from vla_dist.models.conditioning import ReturnConditioning
    from vla_dist.models.decision_transformer.decision_transformer import DecisionTransformer
    from vla_dist.models.decision_transformer.presets import PRESETS
    from vla_dist.models.goals import GoalTable

    torch.manual_seed(seed)
    spec = tabletop_spec()
    model = DecisionTransformer(PRESETS["small"](spec))
    goals = GoalTable(lambda texts: np.ones((len(texts), model.config.goal_dim), np.float32))
    goals.remember([INSTRUCTION])
    return auto.make_artifact(model, name=NAME, spec=spec, conditioning=ReturnConditioning(), goals=goals)
