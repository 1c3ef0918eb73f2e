"""One robot of the benchmark: records synthetic steps at a rate, as any robot does, and says what that cost it.

Started as ``python robot.py JSON``; told on its input when to begin, it prints one line of JSON when that closes.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np

from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Observation
from vla_dist.robot.client import PolicyClient
from vla_dist.robot.fleet_client import FleetClient
from vla_dist.robot.recorder import RecorderConfig, RobotRecorder
from vla_dist.robot.spool import Spool, SpoolConfig
from vla_dist.robot.uploader import SpoolUploader


def main() -> None:
    settings = json.loads(sys.argv[1])
    spec = EnvSpec.from_json(settings["spec"])
    spool = Spool(Path(settings["spool"]), SpoolConfig(reserve_bytes=1 << 20))
    recorder = RobotRecorder(
        spool, spec, RecorderConfig(robot_id=settings["robot_id"], segment_steps=32, jpeg_quality=90)
    )
    with PolicyClient(settings["server"]) as client:
        uploader = SpoolUploader(FleetClient(client, robot_id=settings["robot_id"], spool_id=spool.spool_id), spool)
        print("ready", flush=True)
        settings["start_at"] = float(sys.stdin.readline())
        stop = threading.Event()
        threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
        time.sleep(max(0.0, settings["start_at"] - time.time()))
        started, cpu = time.monotonic(), time.process_time()
        steps = record(recorder, spec, settings, stop)
        seconds, cpu = time.monotonic() - started, time.process_time() - cpu
        try:
            uploader.flush(timeout_s=60.0)
        finally:
            uploader.close()
            metrics = uploader.metrics()
    spool.close()
    print(
        json.dumps(
            {
                "steps": steps,
                "cpu_percent": 100 * cpu / seconds,
                "memory_mb": peak_memory_mb(),
                "bytes_sent": metrics["bytes_sent"],
                "duplicates": metrics["duplicates"],
                "stream_breaks": metrics["stream_breaks"],
            }
        ),
        flush=True,
    )


def record(recorder: RobotRecorder, spec: EnvSpec, settings: dict, stop: threading.Event) -> int:
    """Episodes of some seconds; the first reading of each step is when it was captured, after ``start_at``."""
    rng = np.random.default_rng(settings["seed"])
    period_s, steps, due = 1.0 / spec.control_hz, 0, time.monotonic()
    frames = {
        camera.name: moving_pictures(rng, camera.height, camera.width, settings["episode_steps"])
        for camera in spec.cameras
    }
    action = np.zeros(spec.action_dim, np.float32)
    while not stop.is_set():
        episode = recorder.begin(task="bench", instruction="do it", source="human")
        for step in range(settings["episode_steps"]):
            if stop.is_set():
                break
            proprio = rng.normal(size=spec.proprio_dim).astype(np.float32)
            proprio[0] = time.time() - settings["start_at"]
            images = {name: pictures[step] for name, pictures in frames.items()}
            episode.add(Observation(proprio=proprio, instruction="do it", images=images), action=action, reward=0.0)
            steps += 1
            due = max(due + period_s, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))
        episode.close(success=True)
    return steps


def moving_pictures(rng: np.random.Generator, height: int, width: int, count: int) -> np.ndarray:
    """(count, H, W, 3) uint8: shapes, shades and a little sensor noise, so that JPEG has what it has of a camera."""
    y, x = np.mgrid[:height, :width]
    pictures = np.empty((count, height, width, 3), np.uint8)
    for step in range(count):
        for channel in range(3):
            wave = 90 * np.sin((x + 3 * step) / (9.0 + channel)) + 60 * np.cos((y - step) / 13.0)
            pictures[step, ..., channel] = np.clip(128 + wave + rng.normal(0, 4, (height, width)), 0, 255)
    return pictures


def peak_memory_mb() -> float:
    """Resident, as the kernel saw it at its highest."""
    for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return float("nan")


if __name__ == "__main__":
    main()
