"""Rates of the single parts of presets on this machine, one process and one core each: what ``vla-dist plan`` reads.

    OMP_NUM_THREADS=1 vla-dist bench parts demo babyai [--seconds 10] [--json FILE]

Nothing else may run beside it. With a GPU the learner is measured on it, too.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psutil

_INSERTED_TOGETHER = 32
_ROBOTS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="+")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each part")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    measured = [measure(name, options.seconds) for name in options.presets]
    print(json.dumps(measured, indent=2))
    if options.json:
        options.json.write_text(json.dumps(measured, indent=2) + "\n")


def measure(name: str, seconds: float) -> dict[str, object]:
    from vla_dist.run.composition.place import Place
    from vla_dist.run.presets import preset
    from vla_dist.run.store import open_store

    config = preset(name)
    many = dataclasses.replace(config.rollout, num_workers=1, episodes_per_task=1_000_000, policy_episodes_per_task=0)
    config = dataclasses.replace(config, rollout=many, min_memory_gib=0.0)
    with tempfile.TemporaryDirectory() as folder, open_store(config, Path(folder)) as store:
        place = Place.of(config, Path(folder), store)
        return {
            "preset": name,
            "machine": f"{_processor()}, {time.strftime('%Y-%m-%d')}",
            "command": f"vla-dist bench parts {name} --seconds {seconds:g}",
            "rollout_steps_per_s": round(_rollout(place, seconds), 1),
            **_replay(place, seconds),
            "learner_updates_per_s": {device: round(_learner(place, device, seconds), 2) for device in _devices()},
            "replica_calls_per_s": round(_replica(place, seconds), 1),
        }


def _rollout(place, seconds: float) -> float:
    from vla_dist.replay.limiter import LimiterConfig
    from vla_dist.run.composition.rollouts import build_rollout_worker
    from vla_dist.run.composition.stores import build_table

    (worker,) = build_rollout_worker(place, 0)
    table = build_table(place)
    table.override_limiter(LimiterConfig(min_steps=1, samples_per_insert=None))
    worker.step()
    before, started = table.stats().steps_inserted, time.monotonic()
    while time.monotonic() - started < seconds:
        worker.step()
    rate = (table.stats().steps_inserted - before) / (time.monotonic() - started)
    # What the learner needs before it starts.
    while table.stats().num_episodes < 2 * len(place.config.env.tasks) + 1:
        worker.step()
    worker.close()
    table.close()
    return rate


def _replay(place, seconds: float) -> dict[str, float]:
    from vla_dist.replay.limiter import LimiterConfig
    from vla_dist.run.composition.learning import build_model_config
    from vla_dist.run.composition.stores import build_table
    from vla_dist.testing.fakes import make_segment

    model = build_model_config(place.config, place.spec)
    apart = dataclasses.replace(place, config=dataclasses.replace(place.config, preset=f"{place.config.preset}-rates"))
    table = build_table(apart, context_steps=model.context_steps, future_steps=model.horizon - 1)
    table.override_limiter(LimiterConfig(min_steps=1, samples_per_insert=None))
    steps = place.config.replay.segment_steps
    count = 0

    def insert() -> None:
        nonlocal count
        segments = [
            make_segment(place.spec, episode_id=f"{count}-{n}", num_steps=steps, is_last=True)
            for n in range(_INSERTED_TOGETHER)
        ]
        count += 1
        started = time.perf_counter()
        table.append_all(segments, timeout_s=30.0)
        spent.append(time.perf_counter() - started)

    spent: list[float] = []
    _repeat(insert, seconds)
    inserts = _INSERTED_TOGETHER * steps / _median(spent)
    batch = place.config.learner.batch_size
    samples = batch / _repeat(lambda: table.sample(batch, timeout_s=30.0), seconds)
    table.close()
    return {"replay_insert_steps_per_s": round(inserts), "replay_sample_windows_per_s": round(samples)}


def _learner(place, device: str, seconds: float) -> float:
    from vla_dist.learner.config import Rank
    from vla_dist.run.composition.learning import build_learner

    config = place.config
    endless = dataclasses.replace(config.learner, total_updates=10**9, publish_updates=(0, 10**9), updates_per_step=5)
    learner = build_learner(
        dataclasses.replace(place, config=dataclasses.replace(config, learner=endless)), Rank(device=device)
    )
    try:
        for _ in range(4):
            learner.step()
        before, started = learner.updates, time.monotonic()
        while time.monotonic() - started < seconds:
            learner.step()
        return (learner.updates - before) / (time.monotonic() - started)
    finally:
        learner.close()


def _replica(place, seconds: float) -> float:
    """Answers for each second of a core that the service takes: decoded, batched, computed and sent over gRPC."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=_serve, args=(place, there), daemon=True)
    server.start()
    try:
        if not here.poll(120):
            raise TimeoutError("the policy service said no address within 120 s")
        address, process = here.recv_bytes().decode(), psutil.Process(server.pid)
        with ThreadPoolExecutor(_ROBOTS) as robots:
            for spent_s in (1.0, seconds):  # Once to warm it up.
                before = sum(process.cpu_times()[:2])
                calls = sum(robots.map(partial(_ask, place, address, spent_s), range(_ROBOTS)))
        return calls / (sum(process.cpu_times()[:2]) - before)
    finally:
        server.terminate()
        server.join(10)


def _serve(place, pipe) -> None:
    from vla_dist.run.composition.services import build_services
    from vla_dist.run.priority import answer_promptly
    from vla_dist.serving.server import SingleServer

    service, ingest = build_services(place)
    with SingleServer(service, ingest=ingest) as server:
        answer_promptly()
        pipe.send_bytes(server.address.encode())
        while True:
            time.sleep(60)


def _ask(place, address: str, seconds: float, robot: int) -> int:
    """How often one robot was answered, asking again at once."""
    from vla_dist.robot.client import PolicyClient
    from vla_dist.run.composition.place import build_env

    env = build_env(place.config)
    observation = env.reset(seed=robot, task=place.config.env.tasks[0]).observation
    env.close()
    reference, calls = f"{place.config.preset}@stable", 0
    with PolicyClient(address) as client:
        session = client.open_session(place.spec, policy=reference, robot_id=f"robot-{robot}")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            session.act(observation, deadline_s=10.0)
            calls += 1
        session.close()
    return calls


def _repeat(action: Callable[[], object], seconds: float) -> float:
    """Median duration of a call."""
    for _ in range(3):
        action()
    spent, end = [], time.monotonic() + seconds
    while time.monotonic() < end or len(spent) < 5:
        started = time.perf_counter()
        action()
        spent.append(time.perf_counter() - started)
    return _median(spent)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _devices() -> list[str]:
    import torch

    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _processor() -> str:
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpu = f", {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else ""
    return f"one core of {names[0] if names else platform.processor()}{gpu}"


if __name__ == "__main__":
    main()
