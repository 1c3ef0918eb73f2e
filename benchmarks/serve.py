"""Control streams through Ray Serve against a plain grpc.aio server around the same service, in one run.

    vla-dist bench serve [--robots 1 8 32] [--seconds 5] [--json FILE]

Both sides serve the same small Decision Transformer (untrained) to robots that ask again as soon as they are answered.
"""

import argparse
import contextlib
import json
import multiprocessing
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

REFERENCE = "bench@stable"


def build_services(redis_url: str):
    from vla_dist.envs.metaworld import tabletop_spec
    from vla_dist.models.auto import build_policy
    from vla_dist.registry.blobs import RedisBlobs
    from vla_dist.registry.store import RedisPolicyRegistry
    from vla_dist.replay.config import BufferConfig
    from vla_dist.replay.table import RedisReplayTable
    from vla_dist.serving.batcher import BatcherConfig, DeadlineBatcher
    from vla_dist.serving.ingest import FleetIngest, IngestConfig
    from vla_dist.serving.service import PolicyService, ServiceConfig
    from vla_dist.serving.versions import PolicyVersions, VersionsConfig

    registry = RedisPolicyRegistry(redis_url, RedisBlobs(redis_url))
    versions = PolicyVersions(registry, build_policy, VersionsConfig(references=(REFERENCE,)))
    versions.start()
    spec = tabletop_spec()
    table = RedisReplayTable(redis_url, spec, BufferConfig(name="bench"))
    service = PolicyService(
        versions, DeadlineBatcher(BatcherConfig(bucket_sizes=(1, 2, 4, 8, 16, 32))), ServiceConfig()
    )
    return service, FleetIngest(table, spec, IngestConfig())


def publish(redis_url: str) -> None:
    import torch

    from vla_dist.envs.metaworld import tabletop_spec
    from vla_dist.models.auto import make_artifact
    from vla_dist.models.conditioning import ReturnConditioning
    from vla_dist.models.decision_transformer import DecisionTransformer
    from vla_dist.models.goals import GoalTable
    from vla_dist.models.presets import preset
    from vla_dist.registry.blobs import RedisBlobs
    from vla_dist.registry.store import RedisPolicyRegistry

    torch.manual_seed(0)
    spec = tabletop_spec()
    model = DecisionTransformer(preset("small", spec, hidden_dim=64, n_layers=2, context_steps=5))
    goals = GoalTable(lambda texts: np.ones((len(texts), model.config.goal_dim), np.float32))
    goals.remember(["go"])
    artifact = make_artifact(model, name="bench", spec=spec, conditioning=ReturnConditioning(), goals=goals)
    RedisPolicyRegistry(redis_url, RedisBlobs(redis_url)).publish(artifact, channel="stable")


def drive(address: str, num_robots: int, seconds: float, ready, go, results) -> None:
    """One process of robots, each a thread that keeps exactly one observation in flight."""
    from concurrent.futures import ThreadPoolExecutor

    from vla_dist.core.types import Observation
    from vla_dist.envs.metaworld import tabletop_spec
    from vla_dist.robot.client import PolicyClient

    spec = tabletop_spec()
    observation = Observation(proprio=np.zeros(spec.proprio_dim, np.float32), instruction="go")

    def one(index: int) -> list[float]:
        with (
            PolicyClient(address) as client,
            client.open_session(spec, policy=REFERENCE, robot_id=str(index)) as session,
        ):
            session.act(observation, deadline_s=5.0)
            ready.release()
            go.wait(60)
            latencies, end = [], time.monotonic() + seconds
            while time.monotonic() < end:
                started = time.monotonic()
                session.act(observation, deadline_s=5.0)
                latencies.append(time.monotonic() - started)
            return latencies

    with ThreadPoolExecutor(num_robots) as threads:
        results.put([latency for part in threads.map(one, range(num_robots)) for latency in part])


def measure(address: str, num_robots: int, seconds: float) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    processes = min(2, num_robots)
    ready, go, results = context.Semaphore(0), context.Event(), context.Queue()
    shares = [num_robots // processes + (i < num_robots % processes) for i in range(processes)]
    robots = [context.Process(target=drive, args=(address, n, seconds, ready, go, results)) for n in shares]
    for process in robots:
        process.start()
    for _ in range(num_robots):
        if not ready.acquire(timeout=60):
            raise TimeoutError("the robots did not connect within 60 s")
    go.set()
    latencies = np.array([latency for _ in robots for latency in results.get(timeout=seconds + 60)])
    for process in robots:
        process.join(timeout=30)
    p50, p99 = np.percentile(latencies, [50, 99]) * 1000
    return {"calls_per_s": len(latencies) / seconds, "p50_ms": float(p50), "p99_ms": float(p99)}


@contextlib.contextmanager
def serving(system: str, redis_url: str):
    if system == "grpc_aio":
        from vla_dist.serving.server import SingleServer

        service, ingest = build_services(redis_url)
        with SingleServer(service, ingest=ingest) as server:
            yield server.address
        return
    from vla_dist.run.launch import ray_runtime
    from vla_dist.run.serve_app import free_ports, start_serving

    build = partial(build_services, redis_url)
    with (
        ray_runtime(num_cpus=4),
        start_serving(build, port=free_ports(1)[0], num_replicas=1, num_cpus=1, token=None) as handle,
    ):
        yield handle.address


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--robots", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from vla_dist.replay.server import EmbeddedServer

    curve: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder, EmbeddedServer(Path(folder) / "redis") as store:
        publish(store.url)
        for system in ("grpc_aio", "serve"):
            with serving(system, store.url) as address:
                for robots in options.robots:
                    found = measure(address, robots, options.seconds)
                    curve.setdefault(str(robots), {})[system] = found
                    print(
                        f"{system:>9} {robots:3d} robots: {found['calls_per_s']:7.0f} calls/s, "
                        f"p50 {found['p50_ms']:6.1f} ms, p99 {found['p99_ms']:6.1f} ms",
                        file=sys.stderr,
                    )
    ratios = {n: row["serve"]["calls_per_s"] / row["grpc_aio"]["calls_per_s"] for n, row in curve.items()}
    answer = {"curve": curve, "throughput_ratio_vs_grpc_aio": ratios}
    print(json.dumps(answer, indent=2))
    if options.json:
        options.json.write_text(json.dumps(answer, indent=2))


if __name__ == "__main__":
    main()
