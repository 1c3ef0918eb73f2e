"""Robots as processes, started once and given one order after the other."""

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from types import TracebackType

import numpy as np
from serve_parts.workload import INSTRUCTION, REFERENCE

_PROGRAM = Path(__file__).with_name("robot.py")


class Fleet:
    """``num_robots`` processes; ``run`` uses the first of them."""

    def __init__(self, num_robots: int) -> None:
        from vla_dist.envs.metaworld import tabletop_spec

        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._robots = [
            subprocess.Popen(
                [sys.executable, str(_PROGRAM), f"robot-{index}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
                env=environment,
            )
            for index in range(num_robots)
        ]
        for robot in self._robots:
            _say(robot, tabletop_spec().to_json())

    @property
    def pids(self) -> list[int]:
        return [robot.pid for robot in self._robots]

    def start(self, address: str, num_robots: int, **order: float) -> list:
        """Give the order, wait until each has a session, and let them go."""
        order = {"hz": 0.0, "deadline_s": 5.0, "episode_steps": 0, "seconds": 5.0, **order}
        chosen = self._robots[:num_robots]
        for robot in chosen:
            _say(robot, json.dumps({"address": address, "policy": REFERENCE, "instruction": INSTRUCTION, **order}))
        for robot in chosen:
            if (heard := _hear(robot, 120)) != "ready":
                raise RuntimeError(f"a robot said {heard!r}, expected 'ready'")
        for robot in chosen:
            _say(robot, "go")
        return chosen

    def answers(self, running: list, *, timeout_s: float) -> list[dict]:
        """What each of them saw, when it has ended."""
        return [json.loads(_hear(robot, timeout_s)) for robot in running]

    def run(self, address: str, num_robots: int, **order: float) -> dict:
        running = self.start(address, num_robots, **order)
        return summarised(self.answers(running, timeout_s=order.get("seconds", 5.0) + 90))

    def __enter__(self) -> "Fleet":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for robot in self._robots:
            if robot.stdin is not None:
                robot.stdin.close()
        for robot in self._robots:
            try:
                robot.wait(10)
            except subprocess.TimeoutExpired:
                robot.kill()


def summarised(results: list[dict]) -> dict:
    latencies = np.array([latency for one in results for latency in one["latencies"]] or [0.0])
    misses, failures = (sum(one[name] for one in results) for name in ("misses", "failures"))
    calls = sum(len(one["latencies"]) for one in results)
    p50, p99, p999 = np.percentile(latencies, [50, 99, 99.9]) * 1000
    return {
        "calls": calls + misses + failures,
        "calls_per_s": sum(len(one["latencies"]) / one["seconds"] for one in results),
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "p999_ms": float(p999),
        "misses": misses,
        "miss_rate": (misses + failures) / max(1, calls + misses + failures),
        "failed_calls": failures,
        "errors": sorted({error for one in results for error in one["errors"]})[:5],
        "episodes": sum(one["episodes"] for one in results),
        "mixed_episodes": sum(one["mixed"] for one in results),
        "versions": sorted({version for one in results for version in one["versions"]}),
        "reconnects": sum(one["reconnects"] for one in results),
    }


def _say(robot: subprocess.Popen, line: str) -> None:
    assert robot.stdin is not None
    robot.stdin.write(line + "\n")
    robot.stdin.flush()


def _hear(robot: subprocess.Popen, timeout_s: float) -> str:
    assert robot.stdout is not None
    if not select.select([robot.stdout], [], [], timeout_s)[0]:
        raise TimeoutError(f"a robot said nothing for {timeout_s:g} s")
    return robot.stdout.readline().strip()
