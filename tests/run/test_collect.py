"""A campaign over real gRPC, Redis and Parquet: exactly what was asked for, and everything else with its reason."""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla_dist.collection.campaign import Campaign, Quota
from vla_dist.core.errors import ConfigError, Forbidden, Unauthorised
from vla_dist.core.protocols import RobotEnv
from vla_dist.core.types import Array, Source, Step
from vla_dist.protocol.fleet_records import EpisodeRecord
from vla_dist.replay.archive.archiver import read_archive
from vla_dist.robot.client import PolicyClient
from vla_dist.robot.fleet_client import FleetClient
from vla_dist.robot.spool import Spool
from vla_dist.robot.spool_writer import spool_sink
from vla_dist.robot.station import LocalAssignments, StationConfig, open_station, run_station
from vla_dist.robot.uploader import SpoolUploader
from vla_dist.run.collect import CampaignResult, CampaignRun, CampaignStatus
from vla_dist.run.collection_report import CONTACT_SHEET, REPORT, ArchiveCheck, write_report
from vla_dist.run.data_sets import check_data_set, open_data_set
from vla_dist.run.fleet_simulation import FleetSimulation, SimulatedFleet
from vla_dist.run.simulators import build_simulator
from vla_dist.serving.authorisation import create_token
from vla_dist.serving.event_log import read_events
from vla_dist.testing.fakes import make_segment

TASK = "length-5-8"
CAMPAIGN = Campaign(
    name="trial",
    environment="t-maze",
    segment_steps=8,
    port=0,
    lease_s=5.0,
    quotas=(Quota(task=TASK, episodes=6, source="expert"),),
)


class Running:
    """A campaign in a thread; ``result`` when it has ended by itself."""

    def __init__(self, campaign: Campaign, folder: Path) -> None:
        self.env, self.actors = build_simulator("t-maze", tasks=(TASK,))
        self.folder, self.campaign = folder, campaign
        self.status: list[CampaignStatus] = []
        self.stop = threading.Event()
        self.result: CampaignResult | None = None
        self.run = CampaignRun(campaign, self.env.spec, folder, on_status=self.status.append, home=folder.parent)
        self._thread = threading.Thread(target=self._execute, daemon=True)
        self._thread.start()
        end = time.monotonic() + 60
        while not self.status and time.monotonic() < end:
            time.sleep(0.02)

    def _execute(self) -> None:
        self.result = self.run.execute(stop=self.stop)

    @property
    def address(self) -> str:
        return self.status[-1].address

    def join(self, timeout_s: float = 60.0) -> CampaignResult:
        self._thread.join(timeout_s)
        assert self.result is not None, "the campaign did not end"
        return self.result

    def station(self, robot_id: str, *, token: str = "") -> StationConfig:
        return StationConfig(
            server=self.address,
            token=token,
            robot_id=robot_id,
            spool=self.folder / "spools" / robot_id,
            segment_steps=8,
            serves_policies=False,
        )


class BreakingRobot:
    """Its driver raises what is no error of ours, from one step of its life on."""

    def __init__(self, env: RobotEnv, breaks_at: int) -> None:
        self._env, self._left = env, breaks_at

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def step(self, action: Array) -> Step:
        self._left -= 1
        if self._left < 0:
            raise OSError("no such device: /dev/video0")
        return self._env.step(action)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vla_dist.run.collect._SILENT_S", 1.5)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    running = Running(CAMPAIGN, tmp_path / "collect")
    yield running
    running.stop.set()
    running.join()


def collect(running: Running, robot_id: str, *, token: str = "", breaks_at: int | None = None) -> None:
    env, actors = build_simulator("t-maze", tasks=(TASK,))
    if breaks_at is not None:
        env = BreakingRobot(env, breaks_at)
    with open_station(env, running.station(robot_id, token=token), actors=actors) as collector:
        run_station(collector, stop=running.stop)


def test_a_campaign_ends_with_exactly_what_was_asked_for(running: Running) -> None:
    robots = [threading.Thread(target=collect, args=(running, f"arm-{index}")) for index in range(2)]
    for robot in robots:
        robot.start()
    result = running.join()
    for robot in robots:
        robot.join(20)
    assert [entry.verdict for entry in result.entries] == ["accepted"] * 6
    problems = write_report(running.folder, CAMPAIGN, result.state, result.entries, running.run.archive)
    assert problems == []
    assert "6 episodes, each once" in (running.folder / REPORT).read_text()
    assert (running.folder / CONTACT_SHEET).stat().st_size > 1000
    chosen = json.loads((running.folder / "selection.json").read_text())
    assert sorted(chosen) == sorted(entry.record.episode_id for entry in result.entries)
    assert check_data_set(str(running.folder)) == (6, [])
    data = open_data_set(str(running.folder))
    assert {data.records[episode.episode_id].verdict for episode in data.episodes()} == {"accepted"}


def test_a_strange_robot_disturbs_nobody(running: Running, tmp_path: Path) -> None:
    """A mislabelled task, another contract's numbers and a doubled name, beside a robot that works."""
    spool = Spool(tmp_path / "strange")
    sink = spool_sink(spool)
    for episode_id, task in (("mislabelled", "lenght-5-8"), ("misfit", TASK)):
        segment = make_segment(running.env.spec, episode_id=episode_id, is_last=True, task=task)
        if episode_id == "misfit":
            segment = replace(segment, proprio=np.zeros((8, 9), np.float32))
        sink(segment)
    with PolicyClient(running.address) as client:
        fleet = FleetClient(client, robot_id="robot-0", spool_id=spool.spool_id)
        uploader = SpoolUploader(fleet, spool)
        uploader.flush(timeout_s=10)
        uploader.close()
        assert uploader.metrics()["quarantined"] == 2
        with pytest.raises(Unauthorised, match="in use by a robot on"):
            FleetClient(client, robot_id="robot-0", spool_id="another").next_task()
    spool.close()
    collect(running, "arm-0")
    result = running.join()
    assert result.state.quotas[0].accepted == 6
    reasons = [path.read_text() for path in (running.folder / "quarantine").glob("*.reason")]
    assert any("did the robot mean 'length-5-8'" in one for one in reasons)
    assert any("shape (8, 9), expected (8, 4)" in one for one in reasons)
    assert {episode[0].robot_id for episode in read_archive(running.run.archive)} == {"arm-0"}


def test_a_robot_speaks_for_itself_only(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.json"
    mine = create_token(tokens, name="arm-0", role="robot", robot_id="arm-0")
    running = Running(replace(CAMPAIGN, tokens="tokens.json", token="of the site"), tmp_path / "collect")
    with pytest.raises(Unauthorised, match="no bearer token"):
        collect(running, "arm-1")
    with pytest.raises(Forbidden, match="arm-1"):
        collect(running, "arm-1", token=mine)
    collect(running, "arm-0", token=mine)
    result = running.join()
    assert {entry.record.robot_id for entry in result.entries} == {"arm-0"}
    refusals = read_events(running.folder / "audit.jsonl")
    assert len(refusals) >= 2
    kept = (running.folder / "campaign.json").read_text() + json.dumps(refusals)
    assert mine not in kept
    assert "of the site" not in kept


def test_a_broken_robot_leaves_the_work_to_those_that_can(tmp_path: Path) -> None:
    """It took one lease after the other, so that nothing was left for the others until they expired."""
    running = Running(replace(CAMPAIGN, lease_s=600.0), tmp_path / "collect")
    broken = threading.Thread(target=collect, args=(running, "arm-0"), kwargs={"breaks_at": 3}, daemon=True)
    broken.start()
    end = time.monotonic() + 60
    while not any(robot.counters.get("faults", 0) >= 2 for robot in running.status[-1].state.robots):
        assert time.monotonic() < end
        time.sleep(0.05)
    collect(running, "arm-1")
    result = running.join()
    broken.join(20)
    assert result.state.quotas[0].accepted == 6
    partial = [entry for entry in result.entries if entry.record.partial]
    assert [(one.record.robot_id, one.record.num_steps) for one in partial] == [("arm-0", 3)]
    assert "driver failed with OSError: no such device: /dev/video0" in partial[0].record.partial


@pytest.mark.parametrize(
    ("driver", "task"),
    [
        ("babyai", "GoToRedBallGrey"),
        ("metaworld", "reach"),
        ("key-to-door", "one-door"),
        ("t-maze", TASK),
    ],
)
def test_every_simulators_expert_records_an_episode(tmp_path: Path, driver: str, task: str) -> None:
    """BabyAI's looks at the grid that was laid out; asked before the reset, it took its robot down."""
    env, actors = build_simulator(driver, tasks=(task,))
    station = StationConfig(
        server="127.0.0.1:1", robot_id="arm-0", spool=tmp_path, serves_policies=False, flush_timeout_s=0.1
    )
    ask = LocalAssignments(task=task, source="expert", episodes=1)
    with open_station(env, station, actors=actors, ask=ask) as collector:
        metrics = collector.step()
    env.close()
    assert (metrics["episodes"], metrics["successes"], metrics["faults"]) == (1, 1, 0)
    assert metrics["closed_episodes"] == 1


def test_a_simulated_robot_that_cannot_start_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It was started again and again in silence, and the campaign never ended."""
    fleet = SimulatedFleet(FleetSimulation(server="127.0.0.1:1", driver="t-maze", num_robots=1), tmp_path)
    end = time.monotonic() + 60
    while "sim-0 died" not in caplog.text and time.monotonic() < end:
        time.sleep(0.05)
    fleet.close()
    assert "robot sim-0 died (exit 1): vla-dist: t-maze has mazes of any length; say which" in caplog.text


def test_it_goes_on_where_it_was_and_refuses_to_mix(tmp_path: Path) -> None:
    folder = tmp_path / "collect"
    first = Running(CAMPAIGN, folder)
    source: Source = "expert"
    ask = LocalAssignments(task=TASK, source=source, episodes=2)
    env, actors = build_simulator("t-maze", tasks=(TASK,))
    with open_station(env, first.station("arm-0"), actors=actors, ask=ask) as collector:
        run_station(collector, stop=first.stop)
    first.stop.set()
    first.join()
    with pytest.raises(ConfigError, match=r"holds campaign 'trial' with other quotas\[0\]\.source"):
        CampaignRun(
            replace(CAMPAIGN, quotas=(Quota(task=TASK, episodes=6, source="human"),)),
            env.spec,
            folder,
            on_status=lambda _: None,
        )
    second = Running(CAMPAIGN, folder)
    collect(second, "arm-0")
    result = second.join()
    assert (result.state.quotas[0].accepted, result.state.quotas[0].attempts) == (6, 6)
    assert check_data_set(str(folder)) == (6, [])


def test_the_archive_is_compared_with_what_robots_say(tmp_path: Path, running: Running) -> None:
    collect(running, "arm-0")
    result = running.join()
    episodes = list(read_archive(running.run.archive))
    changed = replace(result.entries[1].record, content_sha256="0" * 64)
    longer = replace(result.entries[2].record, num_steps=99)
    missing = EpisodeRecord(
        episode_id="gone", robot_id="r", task=TASK, source="expert", num_steps=1, num_segments=1, success=True
    )
    records = [result.entries[0].record, changed, longer, *(one.record for one in result.entries[3:]), missing]
    entries = [replace(result.entries[0], record=one) for one in records]
    check = ArchiveCheck(entries)
    for episode in [*episodes, episodes[0]]:
        check.add(episode)
    text = "\n".join(check.problems())
    for words in ("gone is not in the archive", "is there 2 times", "differs from what robot", "recorded 99"):
        assert words in text
