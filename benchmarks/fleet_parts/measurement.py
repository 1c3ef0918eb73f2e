"""Robots as processes against one server, and what the replay says of when each of their steps could be learnt from."""

import json
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from fleet_parts.server import open_table

from vla_dist.core.specs import CameraSpec, Dimension, EnvSpec
from vla_dist.run.faulty_link import FaultyLink

_PARTS = Path(__file__).parent
_HZ = 10.0
_READY_S = 1.0
"""Robots begin together, this long after the last one was ready."""


def make_spec(*, cameras: bool) -> EnvSpec:
    """39 readings, 4 commands, and two 128-pixel cameras or none."""
    views = tuple(CameraSpec(name=name, height=128, width=128) for name in ("wrist", "table")) if cameras else ()
    return EnvSpec(
        name="bench",
        proprio=tuple(Dimension(name=f"p{index}") for index in range(39)),
        action=tuple(Dimension(name=f"a{index}", low=-1, high=1) for index in range(4)),
        control_hz=_HZ,
        max_episode_steps=1000,
        cameras=views,
    )


def measure(
    redis_url: str, folder: Path, *, num_robots: int, cameras: bool, seconds: float, episode_steps: int = 50
) -> dict[str, float]:
    """A fleet that records for so long, without faults."""
    spec, name = make_spec(cameras=cameras), f"fleet-{num_robots}-{int(cameras)}"
    table = open_table(redis_url, spec, name)
    with server(redis_url, spec, name) as address:
        robots, start_at = start_robots(folder / name, address, spec, num_robots, episode_steps)
        time.sleep(max(0.0, start_at - time.time()) + seconds)
        answers = stop_robots(robots)
        wall_s = time.time() - start_at
    inserted = table.stats().steps_inserted
    lags, waits = trainable_lags(table, start_at)
    table.close()
    recorded = sum(answer["steps"] for answer in answers)
    return {
        "recorded_steps": recorded,
        "acknowledged_steps": inserted,
        "acknowledged_steps_per_s": inserted / wall_s,
        "bytes_per_step": sum(answer["bytes_sent"] for answer in answers) / max(1, recorded),
        "robot_cpu_percent": float(np.mean([answer["cpu_percent"] for answer in answers])),
        "robot_memory_mb": float(np.max([answer["memory_mb"] for answer in answers])),
        "capture_to_trainable_p50_s": float(np.percentile(lags, 50)),
        "capture_to_trainable_p99_s": float(np.percentile(lags, 99)),
        "episode_end_to_trainable_p50_s": float(np.percentile(waits, 50)),
        "episode_end_to_trainable_p99_s": float(np.percentile(waits, 99)),
        "duplicates": sum(answer["duplicates"] for answer in answers),
    }


def measure_outage(
    redis_url: str, folder: Path, *, num_robots: int, cameras: bool, outage_s: float, episode_steps: int = 50
) -> dict[str, float]:
    """The link breaks for so long while the robots go on; then the backlog drains beside what they record."""
    spec, name = make_spec(cameras=cameras), f"outage-{num_robots}-{int(cameras)}"
    table = open_table(redis_url, spec, name)
    with server(redis_url, spec, name) as address:
        link = FaultyLink(address)
        robots, start_at = start_robots(folder / name, link.address, spec, num_robots, episode_steps)
        time.sleep(max(0.0, start_at - time.time()) + 10.0)
        link.cut()
        time.sleep(outage_s)
        before, mended_at = table.stats().steps_inserted, time.time()
        link.mend()
        per_s = num_robots * _HZ
        # Drained once what is stored is what was recorded, but for the episodes under way.
        while time.time() - mended_at < 10 * outage_s:
            stored = table.stats().steps_inserted
            behind = (time.time() - start_at) * per_s - stored
            if behind < num_robots * 2 * episode_steps:
                break
            time.sleep(0.05)
        drained_s = time.time() - mended_at
        answers = stop_robots(robots)
        link.close()
    inserted = table.stats().steps_inserted
    table.close()
    return {
        "outage_s": outage_s,
        "backlog_steps": outage_s * per_s,
        "drained_in_s": drained_s,
        "drain_speed_over_capture_speed": (stored - before) / drained_s / per_s,
        "recorded_steps": sum(answer["steps"] for answer in answers),
        "acknowledged_steps": inserted,
        "duplicates": sum(answer["duplicates"] for answer in answers),
    }


def trainable_lags(table, start_at: float) -> tuple[np.ndarray, np.ndarray]:
    """Of each step, and of each episode's last: seconds from its capture until its episode was whole in the replay."""
    lags, waits = [], []
    for entry in table.reader.entries(timeout_s=10.0):
        captured = np.concatenate(
            [segment.proprio[: segment.length, 0] for segment in table.read_episode(entry, timeout_s=10.0)]
        )
        ages = entry["completed_at_s"] - start_at - captured
        lags.append(ages)
        waits.append(ages[-1])
    return np.concatenate(lags), np.array(waits)


@contextmanager
def server(redis_url: str, spec: EnvSpec, name: str):
    settings = {"redis_url": redis_url, "spec": spec.to_json(), "name": name, "port": 0}
    process = start(["server.py", json.dumps(settings)])
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.wait(20)


def start_robots(folder: Path, address: str, spec: EnvSpec, num_robots: int, episode_steps: int):
    robots = []
    for index in range(num_robots):
        settings = {
            "server": address,
            "spec": spec.to_json(),
            "robot_id": f"robot-{index}",
            "spool": str(folder / f"robot-{index}"),
            "seed": index,
            "episode_steps": episode_steps,
        }
        robots.append(start(["robot.py", json.dumps(settings)]))
    for robot in robots:
        assert robot.stdout.readline().strip() == "ready"
    start_at = time.time() + _READY_S
    for robot in robots:
        robot.stdin.write(f"{start_at}\n")
        robot.stdin.flush()
    return robots, start_at


def stop_robots(robots) -> list[dict[str, float]]:
    for robot in robots:
        robot.stdin.close()
    answers = [json.loads(robot.stdout.readline()) for robot in robots]
    for robot in robots:
        robot.wait(20)
    return answers


def start(words: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(_PARTS / words[0]), *words[1:]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
