"""A fleet on one machine: each robot a process of its own, with delays, broken links and crashes on demand."""

import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from vla_dist.core.errors import ConfigError
from vla_dist.core.specs import CameraSpec
from vla_dist.core.types import Source
from vla_dist.run.children import die_with_parent
from vla_dist.run.faulty_link import FaultyLink
from vla_dist.run.serve_settings import TOKEN_VARIABLE

_log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.2
_STOP_TIMEOUT_S = 15.0
_MAX_PAUSE_S = 10.0
_MAX_WORDS = 500
"""Of a dead robot's log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSimulation:
    """What is simulated."""

    server: str
    """``host:port`` of the fleet's service."""
    driver: str
    num_robots: int
    policy_server: str = ""
    """``host:port`` where policies are served, if elsewhere; links to it are neither delayed nor cut."""
    tasks: tuple[str, ...] = ()
    cameras: tuple[CameraSpec, ...] = ()
    max_episode_steps: int = 200
    robot_prefix: str = "sim"
    control_hz: float = 0.0
    """0: as fast as the simulator goes."""
    segment_steps: int = 32
    jpeg_quality: int = 90
    token: str = ""
    noise: float = 0.0
    """Of the experts."""
    task: str = ""
    """Do this instead of asking the server."""
    source: Source = "expert"
    policy: str = ""
    episodes: int = 1
    """Of each robot, with ``task``."""
    delay_ms: float = 0.0
    """Added to each direction of every robot's link."""
    cuts_per_minute: float = 0.0
    """How often a robot's link breaks, on average."""
    cut_s: float = 2.0
    """How long it stays broken, on average."""
    crashes_per_minute: float = 0.0
    """How often a robot's process is killed, on average; it is started again with its spool."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_robots < 1:
            raise ConfigError(f"num_robots {self.num_robots} must be at least 1")
        for name in ("control_hz", "delay_ms", "cuts_per_minute", "cut_s", "crashes_per_minute"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} {getattr(self, name)} must not be negative")

    @property
    def has_faulty_links(self) -> bool:
        return bool(self.delay_ms or self.cuts_per_minute)


class SimulatedFleet:
    """The running processes; ``close`` ends them and nothing else."""

    def __init__(self, simulation: FleetSimulation, spools: Path) -> None:
        """
        Args:
            spools: folder in which each robot has its spool; the same folder again goes on with them.
        """
        self._simulation = simulation
        self._random = random.Random(simulation.seed)
        self._closed = threading.Event()
        self.crashes = 0
        spools.mkdir(parents=True, exist_ok=True)
        self._robots = [
            RobotProcess(simulation, f"{simulation.robot_prefix}-{index}", spools, seed=simulation.seed + index)
            for index in range(simulation.num_robots)
        ]
        for robot in self._robots:
            robot.start()
        self._thread = threading.Thread(target=self._watch, name="fleet", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether every robot was drained."""
        return all(robot.is_done for robot in self._robots)

    @property
    def pids(self) -> list[int]:
        """Of those that run now."""
        return [robot.pid for robot in self._robots if robot.pid]

    def wait(self, *, timeout_s: float) -> bool:
        """Whether all were done within that time."""
        end = time.monotonic() + timeout_s
        while not self.is_done and time.monotonic() < end and not self._closed.is_set():
            self._closed.wait(_LOOK_EVERY_S)
        return self.is_done

    def close(self) -> None:
        """Ask each process to end, then kill it; their spools stay."""
        self._closed.set()
        self._thread.join(_STOP_TIMEOUT_S)
        for robot in self._robots:
            robot.ask_to_stop()
        end = time.monotonic() + _STOP_TIMEOUT_S
        for robot in self._robots:
            robot.stop(timeout_s=max(0.1, end - time.monotonic()))

    def _watch(self) -> None:
        rate_s = self._simulation.crashes_per_minute * len(self._robots) / 60.0
        next_crash = time.monotonic() + (self._random.expovariate(rate_s) if rate_s else float("inf"))
        while not self._closed.wait(_LOOK_EVERY_S):
            for robot in self._robots:
                robot.revive()
            if time.monotonic() >= next_crash:
                next_crash = time.monotonic() + self._random.expovariate(rate_s)
                victim = self._random.choice(self._robots)
                self.crashes += victim.crash()


class RobotProcess:
    """One ``vla-dist robot run`` and its link."""

    def __init__(self, simulation: FleetSimulation, robot_id: str, spools: Path, *, seed: int) -> None:
        self.robot_id = robot_id
        self._simulation = simulation
        self._folder = spools
        self._process: subprocess.Popen[bytes] | None = None
        self._failures = 0
        self._start_at = 0.0
        self.is_done = False
        self._link = None
        if simulation.has_faulty_links:
            self._link = FaultyLink(
                simulation.server,
                delay_s=simulation.delay_ms / 1000.0,
                cuts_per_s=simulation.cuts_per_minute / 60.0,
                cut_s=simulation.cut_s,
                seed=seed,
            )

    @property
    def pid(self) -> int:
        """0 where none runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else 0

    def start(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        if self._simulation.token:
            environment[TOKEN_VARIABLE] = self._simulation.token
        with open(self._folder / f"{self.robot_id}.log", "ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def revive(self) -> None:
        """Start it again where it died, with a pause that grows where it dies at once."""
        if self.is_done or self._process is None or self._process.poll() is None:
            return
        if self._process.returncode == 0:
            self.is_done = True
            return
        if not self._start_at:
            self._failures += 1
            if self._failures > 1:  # the first may be a crash that was asked for
                _log.warning("robot %s died (exit %d): %s", self.robot_id, self._process.returncode, self._last_words())
            self._start_at = time.monotonic() + min(_MAX_PAUSE_S, 0.2 * 2 ** min(self._failures, 6))
        elif time.monotonic() >= self._start_at:
            self._start_at = 0.0
            self.start()

    def crash(self) -> bool:
        """Kill it as a power loss would; whether it ran."""
        if not self.pid or self._process is None:
            return False
        self._failures = 0
        self._process.kill()
        return True

    def ask_to_stop(self) -> None:
        if self.pid and self._process is not None:
            self._process.send_signal(signal.SIGINT)

    def stop(self, *, timeout_s: float) -> None:
        if self._process is not None:
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(5.0)
        if self._link is not None:
            self._link.close()

    def _last_words(self) -> str:
        lines = (self._folder / f"{self.robot_id}.log").read_text(errors="replace").strip().splitlines()
        return lines[-1][:_MAX_WORDS] if lines else "it said nothing"

    def _command(self) -> list[str]:
        simulation = self._simulation
        words = [sys.executable, "-m", "vla_dist.cli", "robot", "run", simulation.driver]
        cameras = ",".join(f"{one.name}={one.height}x{one.width}" for one in simulation.cameras)
        options: dict[str, object] = {
            "server": self._link.address if self._link is not None else simulation.server,
            "robot-id": self.robot_id,
            "policy-server": simulation.policy_server,
            "spool": self._folder / self.robot_id,
            "tasks": ",".join(simulation.tasks),
            "cameras": cameras,
            "max-steps": simulation.max_episode_steps,
            "control-hz": simulation.control_hz,
            "segment-steps": simulation.segment_steps,
            "jpeg-quality": simulation.jpeg_quality,
            "noise": simulation.noise,
        }
        if simulation.task:
            options |= {
                "task": simulation.task,
                "source": simulation.source,
                "policy": simulation.policy,
                "episodes": simulation.episodes,
            }
        for name, value in options.items():
            if value != "":
                words += [f"--{name}", str(value)]
        return words
