"""``vla-dist fleet``: many robots on one machine, for a campaign or for a server under test."""

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from vla_dist.core.errors import ConfigError
from vla_dist.core.types import Source
from vla_dist.run.fleet_simulation import FleetSimulation, SimulatedFleet
from vla_dist.run.simulators import parse_cameras

_USAGE = """usage: vla-dist fleet simulate --server HOST:PORT --num-robots N [options]

Each robot is a process of its own with its own spool. 'vla-dist fleet simulate --help' explains the options."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateOptions:
    """Simulated robots, each a process, that do what the server's campaign asks, or one task."""

    server: str
    """host:port of the fleet's service."""
    num_robots: int
    driver: str = "metaworld"
    """metaworld, babyai, t-maze, key-to-door or gymnasium:ID."""
    policy_server: str = ""
    """host:port where policies are served, if elsewhere; links to it are neither delayed nor cut."""
    tasks: tuple[str, ...] = ()
    """That they can do; empty: all of the driver's."""
    cameras: tuple[str, ...] = ()
    """NAME=HEIGHTxWIDTH each."""
    max_steps: int = 200
    control_hz: float = 0.0
    """Steps a second; 0: as fast as it goes."""
    segment_steps: int = 32
    jpeg_quality: int = 90
    noise: float = 0.0
    """Of the experts."""
    task: str = ""
    """Do this over and over instead of asking the server."""
    source: Source = "expert"
    """Who acts, with --task."""
    policy: str = ""
    """name@channel, with --source policy."""
    episodes: int = 1
    """Of each robot, with --task."""
    delay: float = 0.0
    """Milliseconds added to each direction of every link."""
    loss: float = 0.0
    """How many times a minute each link is cut, on average."""
    cut_s: float = 2.0
    """How long a cut lasts, on average."""
    crash: float = 0.0
    """How many times a minute each robot is killed, on average."""
    robot_prefix: str = "sim"
    token: str = ""
    spools: Path | None = None
    """Folder of their spools, which a later call goes on with; None: a temporary one."""
    timeout_s: float = 3600.0
    seed: int = 0


def main(arguments: Sequence[str]) -> None:
    words = list(arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE)
        sys.exit(0 if words else 2)
    if words[0] != "simulate":
        raise ConfigError(f"no verb {words[0]!r} of a fleet; there is simulate")
    options = tyro.cli(SimulateOptions, args=words[1:], prog="vla-dist fleet simulate")
    simulation = FleetSimulation(
        server=options.server,
        driver=options.driver,
        policy_server=options.policy_server,
        num_robots=options.num_robots,
        tasks=options.tasks or ((options.task,) if options.task else ()),
        cameras=parse_cameras(options.cameras),
        max_episode_steps=options.max_steps,
        robot_prefix=options.robot_prefix,
        control_hz=options.control_hz,
        segment_steps=options.segment_steps,
        jpeg_quality=options.jpeg_quality,
        token=options.token,
        noise=options.noise,
        task=options.task,
        source=options.source,
        policy=options.policy,
        episodes=options.episodes,
        delay_ms=options.delay,
        cuts_per_minute=options.loss,
        cut_s=options.cut_s,
        crashes_per_minute=options.crash,
        seed=options.seed,
    )
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vla-dist-fleet-") as temporary:
        fleet = SimulatedFleet(simulation, options.spools or Path(temporary))
        try:
            is_done = fleet.wait(timeout_s=options.timeout_s)
        finally:
            fleet.close()
    print(f"{options.num_robots} robots, {fleet.crashes} crashes, {time.monotonic() - started:.0f} s")
    if not is_done:
        raise SystemExit(f"vla-dist: not all robots were done within {options.timeout_s:.0f} s")
