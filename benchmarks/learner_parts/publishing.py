"""From publish() to the first action of the new version by what a replica runs, in a process of its own.

As a program, the replica: python publishing.py URL. It says ``VERSION SECONDS`` of the clock that all processes of the
machine share, for each version that it has fetched, built, warmed up and acted with.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

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
from vla_dist.serving.versions import PolicyVersions, VersionsConfig

_REFERENCE = "bench@stable"
_LOOK_EVERY_S = 0.0005
_TIMEOUT_S = 120.0


def measure_publishing(*, num_versions: int, target_mb: float = 10.0) -> dict[str, Any]:
    """Each version is published when the one before is served; the first, which warms up, does not count."""
    torch.set_num_threads(1)
    model = _model_of_size(target_mb)
    goals = GoalTable(lambda texts: np.ones((len(texts), model.config.goal_dim), np.float32))
    goals.remember(["go"])
    durations, num_bytes = [], 0
    with tempfile.TemporaryDirectory() as folder, EmbeddedServer(Path(folder)) as server:
        registry = RedisPolicyRegistry(server.url, RedisBlobs(server.url))
        replica: subprocess.Popen[str] | None = None
        try:
            for version in range(1, num_versions + 2):
                with torch.no_grad():
                    model.head.bias.fill_(version / 1000)
                artifact = make_artifact(
                    model, name="bench", spec=tabletop(), conditioning=ReturnConditioning(), goals=goals
                )
                started = time.monotonic()
                registry.publish(artifact, channel="stable")
                # A replica waits for its first version, so it starts when there is one.
                replica = replica or subprocess.Popen(
                    [sys.executable, __file__, server.url], stdout=subprocess.PIPE, text=True
                )
                durations.append(1000 * (_served_at(replica, version) - started))
            num_bytes = registry.manifests("bench")[-1].num_bytes
        finally:
            if replica is not None:
                replica.kill()
                replica.communicate()
            registry.close()
    counted = durations[1:]
    return {
        "megabytes": num_bytes / 2**20,
        "versions": len(counted),
        "p50": statistics.median(counted),
        "highest": max(counted),
    }


def _served_at(replica: "subprocess.Popen[str]", version: int) -> float:
    assert replica.stdout is not None
    for line in replica.stdout:
        found, at = line.split()
        if int(found) == version:
            return float(at)
    raise SystemExit(f"the replica ended with {replica.wait()} before it served version {version}")


def _model_of_size(target_mb: float) -> Any:
    """A Decision Transformer whose weights take about so much."""
    layers = max(1, round(target_mb * 2**20 / 4 / (12 * 256**2)))
    return make_model("decision_transformer:small", hidden_dim=256, n_layers=layers, n_heads=4)


def run_replica(url: str) -> None:
    torch.set_num_threads(1)
    registry = RedisPolicyRegistry(url, RedisBlobs(url))
    versions = PolicyVersions(registry, build_policy, VersionsConfig(references=(_REFERENCE,)))
    versions.start()
    observation = Observation(proprio=np.zeros(tabletop().proprio_dim, np.float32), instruction="go")
    served, end = 0, time.monotonic() + _TIMEOUT_S
    while time.monotonic() < end:
        loaded = versions.acquire(_REFERENCE)
        if loaded.version != served:
            loaded.policy.act([observation], [loaded.policy.initial_state()])
            served, end = loaded.version, time.monotonic() + _TIMEOUT_S
            print(served, time.monotonic(), flush=True)
        versions.release(loaded)
        time.sleep(_LOOK_EVERY_S)


if __name__ == "__main__":
    run_replica(sys.argv[1])
