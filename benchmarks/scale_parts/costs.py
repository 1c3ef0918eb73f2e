"""What single parts cost, in seconds of one core, measured on the parts themselves, one after the other."""

import asyncio
import dataclasses
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from scale_parts.system import Costs

BUFFER_WINDOWS = 2_000.0
"""Of the limiter: so small that both sides wait for each other within seconds, as in a long run."""
_READER_CYCLES = 30
_NEW_SEGMENTS = 32
"""That a reader finds in each cycle, and draws from as often as the ratio of the preset says."""
_UPLOADS = 200
_PACED_ROBOTS = 8
_PACED_HZ = 10.0


def measure(preset: str, folder: Path, *, seconds: float) -> tuple[Costs, dict[str, float]]:
    """Costs, and of the run of the preset what the simulation must know beside them."""
    pipeline, facts = _pipeline(preset, folder, seconds)
    return Costs(**pipeline, **_serving(folder, seconds)), facts


def open_place(preset: str, folder: Path, stack: ExitStack, **learner: Any):
    """Of a run that never ends by itself, with a replay of its own."""
    from vla_dist.run.composition.place import Place
    from vla_dist.run.presets import preset as named
    from vla_dist.run.store import open_store

    config = named(preset)
    rollout = dataclasses.replace(
        config.rollout, num_workers=learner.pop("rollouts", 1), episodes_per_task=300_000, policy_episodes_per_task=0
    )
    endless = dataclasses.replace(
        config.learner,
        total_updates=500_000,
        publish_updates=(0, 500_000),
        updates_per_step=5,
        checkpoint_every_updates=500_000,
        **learner,
    )
    fleet = dataclasses.replace(config.fleet, num_robots=0)
    replay = dataclasses.replace(config.replay, error_buffer_steps=BUFFER_WINDOWS)
    config = dataclasses.replace(
        config, rollout=rollout, learner=endless, fleet=fleet, replay=replay, min_memory_gib=0.0
    )
    folder.mkdir(parents=True)
    store = stack.enter_context(open_store(config, folder))
    return Place.of(config, folder, store)


def _pipeline(preset: str, folder: Path, seconds: float) -> tuple[dict[str, float], dict[str, float]]:
    import redis

    from vla_dist.learner.config import Rank
    from vla_dist.models.zoo import architecture
    from vla_dist.replay.limiter import LimiterConfig
    from vla_dist.run.composition.learning import build_learner, build_model_config
    from vla_dist.run.composition.rollouts import build_rollout_worker
    from vla_dist.run.composition.stores import build_table
    from vla_dist.testing.fakes import make_segment

    with ExitStack() as stack:
        place = open_place(preset, folder / "costs", stack)
        with redis.Redis.from_url(place.redis_url) as client:
            server = psutil.Process(client.info("server")["process_id"])
        (worker,) = build_rollout_worker(place, 0)
        member, model = architecture(place.config.model.architecture), build_model_config(place.config, place.spec)
        table = build_table(place, context_steps=model.context_steps, future_steps=model.horizon - 1)
        table.override_limiter(LimiterConfig(min_steps=1, samples_per_insert=None))
        replay, batch_size = place.config.replay, place.config.learner.batch_size

        def inserted() -> int:
            return table.stats().steps_inserted

        worker.step()
        rollout = _Spent(server)
        before, appends, end = inserted(), 0, time.monotonic() + 2 * seconds
        while time.monotonic() < end or inserted() < replay.min_steps:
            worker.step()
            appends += 1
        steps = inserted() - before
        rollout_s, insert_s = rollout.own() / steps, rollout.servers() / steps

        def sample() -> None:
            table.sample(batch_size, timeout_s=60.0)

        end = time.monotonic() + seconds  # Until it has the rows.
        while time.monotonic() < end:
            sample()
        reader = _Spent(server)
        batches = _count(sample, seconds)
        sampling_s, sample_s = reader.own() / batches, reader.servers() / batches

        followed = followed_own = 0.0
        fresh = _NEW_SEGMENTS * replay.segment_steps
        for index in range(_READER_CYCLES):
            names = [f"new-{index}-{number}" for number in range(_NEW_SEGMENTS)]
            length = {"num_steps": replay.segment_steps, "is_last": True}
            new = [make_segment(place.spec, episode_id=name, **length) for name in names]
            table.append_all(new, timeout_s=60.0)
            cycle, num = _Spent(server), max(1, round(fresh * replay.samples_per_insert / batch_size))
            for _ in range(num):
                sample()
            followed += cycle.servers() - num * sample_s
            followed_own += cycle.own() - num * sampling_s
        table.close()
        worker.close()

        learner = build_learner(place, Rank(), opened=stack)
        stack.callback(learner.close)
        for _ in range(4):
            learner.step()
        updates, own, all_threads = learner.updates, time.thread_time(), time.process_time()
        end = time.monotonic() + 2 * seconds
        while time.monotonic() < end:
            learner.step()
        updates = learner.updates - updates
        update_s = (time.thread_time() - own) / updates
        load_s = (time.process_time() - all_threads) / updates - update_s
        costs = {
            "rollout_s": rollout_s,
            "rollout_steps": steps / appends,
            "insert_s": insert_s,
            "follow_s": max(0.0, followed / fresh / _READER_CYCLES),
            "read_s": max(0.0, followed_own / fresh / _READER_CYCLES),
            "sample_s": sample_s,
            "load_s": load_s,
            "update_s": update_s,
            "num_parameters": sum(one.numel() for one in member.model(model).parameters()),
            "ingest_s": _ingest_s(place),
        }
        facts = {
            "batch_size": batch_size,
            "samples_per_insert": replay.samples_per_insert,
            "segment_steps": replay.segment_steps,
            "buffer_windows": BUFFER_WINDOWS,
        }
        return costs, facts


def _ingest_s(place) -> float:
    """Of a replica for one step of a robot's upload: decoded, checked, appended."""
    from vla_dist.protocol.conversion import encode_segment
    from vla_dist.protocol.v1 import fleet_pb2
    from vla_dist.replay.config import BufferConfig
    from vla_dist.replay.table import RedisReplayTable
    from vla_dist.serving.ingest import FleetIngest, IngestConfig
    from vla_dist.testing.fakes import make_segment

    steps = place.config.replay.segment_steps
    table = RedisReplayTable(place.redis_url, place.spec, BufferConfig(name="uploads", num_steps=steps))
    ingest = FleetIngest(table, place.spec, IngestConfig(num_steps=steps))
    requests = [
        fleet_pb2.UploadRequest(
            segment=encode_segment(make_segment(place.spec, episode_id=f"up-{index}", num_steps=steps, is_last=True))
        )
        for index in range(_UPLOADS)
    ]

    async def upload() -> float:
        started = time.process_time()
        for request in requests:
            assert (await ingest.receive(request)).status == "stored"
        return time.process_time() - started

    spent = asyncio.run(upload())
    ingest.shut_down()
    table.close()
    return spent / _UPLOADS / steps


def _serving(folder: Path, seconds: float) -> dict[str, float]:
    """Of Ray Serve around the model of `vla-dist bench serve`: few robots, so that each is answered alone."""
    from serve_parts.fleet import Fleet
    from serve_parts.servers import serving
    from serve_parts.workload import make_artifact, registry_of

    from vla_dist.replay.server import EmbeddedServer

    with EmbeddedServer(folder / "serving") as store:
        registry_of(store.url).publish(make_artifact(0), channel="stable")
        batch_s, row_s = _compute(store.url, seconds)
        with Fleet(_PACED_ROBOTS) as fleet, serving("serve", store.url) as address:
            fleet.run(address, _PACED_ROBOTS, hz=_PACED_HZ, seconds=2.0)
            parts = {
                "gateway": [p for p in psutil.process_iter(["name"]) if p.info["name"] == "haproxy"],
                "replica": [p for p in psutil.process_iter(["cmdline"]) if _is_replica(p)],
                "client": [psutil.Process(pid) for pid in fleet.pids],
            }
            before = {part: cpu_s(*processes) for part, processes in parts.items()}
            calls = fleet.run(address, _PACED_ROBOTS, hz=_PACED_HZ, deadline_s=1.0, seconds=max(5.0, seconds))["calls"]
            spent = {part: (cpu_s(*processes) - before[part]) / calls for part, processes in parts.items()}
    return {
        "gateway_s": spent["gateway"],
        "loop_s": max(0.0, spent["replica"] - batch_s - row_s),
        "batch_s": batch_s,
        "row_s": row_s,
        "client_s": spent["client"],
    }


def _is_replica(process: psutil.Process) -> bool:
    words = process.info["cmdline"] or [""]
    return words[0].startswith("ray::ServeReplica")


def _compute(redis_url: str, seconds: float) -> tuple[float, float]:
    """Of a batch, and of each row in it, from batches of 1 and of 16."""
    from serve_parts.workload import INSTRUCTION, NAME, registry_of

    from vla_dist.core.types import Observation
    from vla_dist.envs.metaworld import tabletop_spec
    from vla_dist.models.auto import build_policy

    policy = build_policy(registry_of(redis_url).fetch(NAME, 1))
    first = Observation(proprio=np.zeros(tabletop_spec().proprio_dim, np.float32), instruction=INSTRUCTION)
    took = {}
    for size in (1, 16):
        states = [policy.initial_state() for _ in range(size)]

        def act(size: int = size) -> None:
            nonlocal states
            _, states = policy.act([first] * size, states)

        for _ in range(25):  # Until the context is full.
            act()
        started = time.process_time()
        took[size] = (started, _count(act, seconds / 2), time.process_time())
    one, many = ((end - start) / count for start, count, end in took.values())
    row_s = max(0.0, (many - one) / 15)
    return one - row_s, row_s


class _Spent:
    """Seconds of a core since it was made: of this process, and of a server."""

    def __init__(self, server: psutil.Process) -> None:
        self._server = server
        self._own, self._servers = time.process_time(), cpu_s(server)

    def own(self) -> float:
        return time.process_time() - self._own

    def servers(self) -> float:
        return cpu_s(self._server) - self._servers


def cpu_s(*processes: psutil.Process) -> float:
    """Finer than the ticks of ``cpu_times`` where Linux tells (schedstat: nanoseconds of each thread)."""
    if sys.platform != "linux":
        return sum(sum(process.cpu_times()[:2]) for process in processes)
    tasks = [task for process in processes for task in Path(f"/proc/{process.pid}/task").iterdir()]
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def _count(action: Callable[[], object], seconds: float) -> int:
    count, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        action()
        count += 1
    return count
