"""From publish() to a follower's first action of the new version, through a real registry."""

import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learner_parts.workload import make_model, tabletop

from vla_dist.core.types import Observation
from vla_dist.models.auto import build_policy, make_artifact
from vla_dist.models.conditioning import ReturnConditioning
from vla_dist.models.goals import GoalTable
from vla_dist.registry.blobs import RedisBlobs
from vla_dist.registry.store import RedisPolicyRegistry
from vla_dist.replay.server import EmbeddedServer

_NAME = "bench"
_TIMEOUT_S = 60.0


def measure_publishing(*, num_versions: int, target_mb: float = 10.0) -> dict[str, Any]:
    """Each version is published when the one before is served; the first, which warms up, does not count."""
    torch.set_num_threads(1)
    model = _model_of_size(target_mb)
    goals = GoalTable(lambda texts: np.ones((len(texts), model.config.goal_dim), np.float32))
    goals.remember(["go"])
    served: dict[int, float] = {}
    arrived, stop = threading.Condition(), threading.Event()
    with tempfile.TemporaryDirectory() as folder, EmbeddedServer(Path(folder)) as server:
        follower = threading.Thread(target=_follow, args=(server.url, served, arrived, stop))
        follower.start()
        registry = RedisPolicyRegistry(server.url, RedisBlobs(server.url))
        durations, num_bytes = [], 0
        try:
            for version in range(1, num_versions + 2):
                with torch.no_grad():
                    model.head.bias.fill_(version / 1000)
                artifact = make_artifact(
                    model, name=_NAME, spec=tabletop(), conditioning=ReturnConditioning(), goals=goals
                )
                started = time.perf_counter()
                registry.publish(artifact, channel="stable")
                with arrived:
                    if not arrived.wait_for(lambda version=version: version in served, timeout=_TIMEOUT_S):
                        raise SystemExit(f"version {version} was not served within {_TIMEOUT_S:.0f} s")
                durations.append(1000 * (served[version] - started))
            num_bytes = registry.manifests(_NAME)[-1].num_bytes
        finally:
            stop.set()
            follower.join(timeout=_TIMEOUT_S)
            registry.close()
    counted = durations[1:]
    return {
        "megabytes": num_bytes / 2**20,
        "versions": len(counted),
        "p50": statistics.median(counted),
        "highest": max(counted),
    }


def _model_of_size(target_mb: float) -> Any:
    """A Decision Transformer whose weights take about so much."""
    layers = max(1, round(target_mb * 2**20 / 4 / (12 * 256**2)))
    return make_model("decision_transformer:small", hidden_dim=256, n_layers=layers, n_heads=4)


def _follow(url: str, served: dict[int, float], arrived: threading.Condition, stop: threading.Event) -> None:
    registry = RedisPolicyRegistry(url, RedisBlobs(url))
    spec, version = tabletop(), 0
    observation = Observation(proprio=np.zeros(spec.proprio_dim, np.float32), instruction="go")
    while not stop.is_set():
        found = registry.follow(f"{_NAME}@stable", after=version, timeout_s=0.5)
        if found == version:
            continue
        policy = build_policy(registry.fetch(_NAME, found))
        policy.act([observation], [policy.initial_state()])
        version = found
        with arrived:
            served[found] = time.perf_counter()
            arrived.notify_all()
    registry.close()
