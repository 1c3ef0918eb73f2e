"""A campaign whose robots, server, Redis and link are killed at random ends with what the recorders had closed."""

import json
import os
import random
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from vla_dist.protocol.episode_content import content_sha256
from vla_dist.protocol.fleet_conversion import decode_episode
from vla_dist.protocol.fleet_records import EpisodeRecord
from vla_dist.protocol.v1 import fleet_pb2
from vla_dist.replay.archive.archiver import read_archive
from vla_dist.run.faulty_link import FaultyLink
from vla_dist.run.fleet_simulation import FleetSimulation, SimulatedFleet

_CAMPAIGN = """
name: storm
environment: t-maze
max_episode_steps: 60
port: {port}
segment_steps: 8
lease_s: 10.0
quotas:
  - {{task: length-5-15, episodes: {episodes}, source: expert, max_attempts: 1000000}}
"""
_KINDS = ("robot", "robot", "server", "redis", "link")
_CLOSED = re.compile(r"closed episode (\w+): (\d+) steps, (\w{64})")


class CampaignProcess:
    """``vla-dist collect`` as a person starts it, in a folder of its own."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.port = port
        self.ask_for(1_000_000)
        self.start()

    def ask_for(self, episodes: int) -> None:
        (self.folder / "storm.yaml").write_text(_CAMPAIGN.format(port=self.port, episodes=episodes))

    def start(self) -> None:
        words = [sys.executable, "-m", "vla_dist.cli", "collect", "storm.yaml", "--plain"]
        with open(self.folder / "collect.log", "ab") as log:
            self.process = subprocess.Popen(words, cwd=self.folder, stdout=log, stderr=log, start_new_session=True)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def kill_redis(self) -> bool:
        """Whether there was one."""
        for child in psutil.Process(self.process.pid).children():
            if child.name().startswith(("valkey", "redis")):
                child.send_signal(signal.SIGKILL)
                return True
        return False

    @property
    def log(self) -> str:
        return (self.folder / "collect.log").read_text()[-4000:]

    def wait_until_it_serves(self, *, timeout_s: float = 60.0) -> None:
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert self.process.poll() is None, self.log
            time.sleep(0.1)
        raise AssertionError(self.log)


@pytest.mark.parametrize(
    ("num_robots", "num_events", "seed"),
    [
        pytest.param(3, 8, 0, marks=[pytest.mark.slow, pytest.mark.timeout(300)]),
        pytest.param(16, 110, 1, marks=[pytest.mark.chaos, pytest.mark.timeout(1500)]),
    ],
)
def test_a_storm_loses_nothing_and_doubles_nothing(tmp_path: Path, num_robots: int, num_events: int, seed: int) -> None:
    chance = random.Random(seed)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    campaign = CampaignProcess(tmp_path, port)
    campaign.wait_until_it_serves()
    link = FaultyLink(f"127.0.0.1:{port}")
    simulation = FleetSimulation(
        server=link.address,
        driver="t-maze",
        tasks=("length-5-15",),
        max_episode_steps=60,
        num_robots=num_robots,
        control_hz=10.0,  # as the contract says: at another rate nothing counts
        segment_steps=8,
    )
    fleet = SimulatedFleet(simulation, tmp_path / "spools")
    events: Counter[str] = Counter()
    try:
        while events.total() < num_events:
            time.sleep(chance.uniform(0.3, 1.5))
            kind = chance.choice(_KINDS)
            events[kind] += strike(kind, campaign, fleet, link, chance)
        # What is there is more than this, so the campaign is over as soon as it goes on.
        campaign.kill()
        campaign.ask_for(5)
        campaign.start()
        assert fleet.wait(timeout_s=120), campaign.log
        code = campaign.process.wait(120)
    finally:
        fleet.close()
        link.close()
        if campaign.process.poll() is None:
            campaign.kill()
    assert code == 0, campaign.log
    counts = compare(tmp_path, num_robots)
    print(json.dumps({"events": events, **counts}))


def strike(
    kind: str, campaign: CampaignProcess, fleet: SimulatedFleet, link: FaultyLink, chance: random.Random
) -> bool:
    """Whether something was hit."""
    if kind == "robot":
        return chance.choice(fleet._robots).crash()
    if kind == "redis":
        return campaign.kill_redis()
    if kind == "server":
        campaign.kill()
        time.sleep(chance.uniform(0.0, 1.0))
        campaign.start()
        campaign.wait_until_it_serves()
        return True
    link.cut()
    time.sleep(chance.uniform(0.2, 2.0))
    link.mend()
    return True


def compare(folder: Path, num_robots: int) -> dict[str, int]:
    """The archive against what the robots' disks and logs say; what was counted."""
    recorded: dict[str, EpisodeRecord] = {}
    told: dict[str, str] = {}
    for index in range(num_robots):
        recorded |= spool_records(folder / "spools" / f"sim-{index}" / "spool.sqlite3")
        log = (folder / "spools" / f"sim-{index}.log").read_text(errors="replace")
        told |= {match[1]: match[3] for match in _CLOSED.finditer(log)}
    archived: Counter[str] = Counter()
    for episode in read_archive(folder / "runs" / "collect-storm" / "archive"):
        name = episode[0].episode_id
        archived[name] += 1
        record = recorded[name]
        assert sum(segment.length for segment in episode) == record.num_steps, name
        assert [segment.segment_index for segment in episode] == list(range(record.num_segments)), name
        if record.content_sha256:
            assert content_sha256(episode) == record.content_sha256, f"{name} is torn"
        assert told.get(name, record.content_sha256) == record.content_sha256, name
    assert set(told) - set(archived) == set(), "a recorder had closed these, and they are lost"
    assert set(archived) == set(recorded)
    assert max(archived.values()) == 1, "stored twice"
    partial = sum(bool(record.partial) for record in recorded.values())
    assert len(told) > 0
    return {
        "episodes": len(archived),
        "closed by recorders": len(told),
        "cut off": partial,
        "lost": 0,
        "twice": 0,
        "torn": 0,
    }


def spool_records(path: Path) -> dict[str, EpisodeRecord]:
    with sqlite3.connect(path) as database:
        rows = database.execute("SELECT episode_id, state, record FROM episodes").fetchall()
    database.close()
    unsent = [name for name, state, _ in rows if state != "done"]
    assert unsent == [], f"{path} still holds {unsent}"
    return {name: decode_episode(fleet_pb2.EpisodeRecord.FromString(record)) for name, _, record in rows}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
