"""A simulated fleet: episodes over the network, uploaded once, resumed where they stopped."""

import threading
from pathlib import Path

import pytest

from vla_dist.core.errors import ConfigError, Unreachable
from vla_dist.core.protocols import Worker
from vla_dist.robot.client import PolicyClient
from vla_dist.robot.control_loop import ControlConfig
from vla_dist.robot.fleet_client import FleetClient
from vla_dist.robot.latency import LatencyHistogram
from vla_dist.robot.simulated_robot import SimulatedRobot, SimulatedRobotConfig
from vla_dist.robot.spool import Spool, SpoolConfig
from vla_dist.robot.uploader import SpoolUploader
from vla_dist.testing.fakes import FakeEnv, make_spec
from vla_dist.testing.serving import REFERENCE

SPEC = make_spec()


def make_robot(client: PolicyClient, spool: Spool | None, index: int = 0) -> SimulatedRobot:
    return SimulatedRobot(
        FakeEnv(SPEC, tasks=("go", "stop")),
        client,
        ControlConfig(policy=REFERENCE, robot_id=f"robot-{index}", control_hz=None, segment_steps=8),
        SimulatedRobotConfig(tasks=("go", "stop"), run_id="run"),
        robot_index=index,
        spool=spool,
    )


def test_one_step_is_one_uploaded_episode(site, client: PolicyClient, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    spool = Spool(tmp_path)
    uploader = SpoolUploader(FleetClient(client, robot_id="robot-0", spool_id=spool.spool_id), spool)
    robot: Worker = make_robot(client, spool)
    robot.step()
    metrics = robot.step()
    uploader.flush(timeout_s=5)
    uploader.close()
    spool.close()
    assert (metrics["episodes"], metrics["steps"], metrics["calls"], metrics["failed_calls"]) == (2, 40, 40, 0)
    latencies = LatencyHistogram.merged([metrics])
    assert 0 < latencies.percentile(50) <= latencies.percentile(99) < 5
    assert metrics["policy_version"] == 1
    episodes = list(site.table.episodes())
    assert [e[0].episode_id for e in episodes] == ["run-r0-000000", "run-r0-000001"]
    assert [e[0].task for e in episodes] == ["go", "stop"]
    robot.close()


def test_without_room_no_episode_begins(site, client: PolicyClient, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    spool = Spool(tmp_path, SpoolConfig(max_bytes=3000, reserve_bytes=2000))
    robot = make_robot(client, spool)
    robot.step()
    assert spool.metrics()["closed_episodes"] == 1
    assert robot.step()["waited"] == 1.0
    assert robot.step()["episodes"] == 1
    spool.close()


def test_an_episode_that_could_not_begin_is_run_later(site, client: PolicyClient) -> None:  # type: ignore[no-untyped-def]
    with PolicyClient(client.address, timeout_s=0.3) as impatient:
        robot = make_robot(impatient, None)
        site.kill()
        with pytest.raises(Unreachable):
            robot.step()
        site.start()
        impatient.timeout_s = 5.0
        assert robot.step()["episodes"] == 1
        assert robot.last_report is not None
        assert robot.last_report.episode_id == "run-r0-000000"


def test_a_fleet_lives_through_a_restart_without_a_failed_call(site, client: PolicyClient) -> None:  # type: ignore[no-untyped-def]
    robots = [make_robot(client, None, index) for index in range(4)]
    totals: list[dict[str, float]] = []

    def drive(robot: SimulatedRobot) -> None:
        for _ in range(3):
            metrics = dict(robot.step())
        totals.append(metrics)

    threads = [threading.Thread(target=drive, args=(robot,)) for robot in robots]
    for thread in threads:
        thread.start()
    site.kill()
    site.start()
    for thread in threads:
        thread.join(30)
    assert [t["episodes"] for t in totals] == [3] * 4
    assert sum(t["failed_calls"] for t in totals) == 0
    assert sum(t["lost_episodes"] for t in totals) == 0


@pytest.mark.parametrize("settings", [{"tasks": ()}])
def test_settings_are_checked(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        SimulatedRobotConfig(**({"tasks": ("go",), "run_id": "x"} | settings))  # type: ignore[arg-type]
