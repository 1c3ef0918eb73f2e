"""What a robot records is what it lived through; whatever goes wrong, what came before it can be used."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vla_dist.core.errors import ConfigError, DataError, ResourceMissing
from vla_dist.core.specs import CameraSpec
from vla_dist.core.types import Observation
from vla_dist.protocol.fleet_conversion import decode_episode
from vla_dist.protocol.fleet_records import EpisodeRecord, Intervention
from vla_dist.protocol.v1 import fleet_pb2
from vla_dist.robot.recorded_robot import RecordedRobot
from vla_dist.robot.recorder import RecorderConfig, RobotRecorder
from vla_dist.robot.spool import Spool, SpoolConfig
from vla_dist.testing.fakes import FakeEnv, make_spec

SPEC = make_spec(proprio_dim=3, action_dim=2, cameras=(CameraSpec(name="top", height=16, width=16),))
CONFIG = RecorderConfig(robot_id="arm-3", segment_steps=4, checks_rate=False)


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool(tmp_path / "spool", SpoolConfig(max_bytes=1 << 20, reserve_bytes=0))
    yield spool
    spool.close()


def observation(step: int = 0) -> Observation:
    proprio = np.array([step, 1, 2], np.float32)
    return Observation(
        proprio=proprio, instruction="open the drawer", images={"top": np.full((16, 16, 3), step, np.uint8)}
    )


def begin(spool: Spool, **settings: object):  # type: ignore[no-untyped-def]
    recorder = RobotRecorder(spool, SPEC, replace(CONFIG, **settings))  # type: ignore[arg-type]
    return recorder.begin(task="open", instruction="open the drawer", source="policy", lease_id="0-abc")


def add(episode, count: int, *, operator: str = "") -> None:  # type: ignore[no-untyped-def]
    for _ in range(count):
        step = episode.num_steps
        episode.add(observation(step), action=np.full(2, 0.1, np.float32), reward=float(step), operator=operator)


def add_slowly(episode) -> None:  # type: ignore[no-untyped-def]
    """So that the disk is heard of before the queue to it is full."""
    for _ in range(500):
        add(episode, 1)
        time.sleep(0.001)


def spooled(spool: Spool) -> list[fleet_pb2.UploadRequest]:
    return [fleet_pb2.UploadRequest.FromString(one.request) for one in spool.pending(limit=100)]


def record_of(spool: Spool) -> EpisodeRecord:
    return decode_episode(spooled(spool)[-1].episode)


def test_an_episode_is_on_the_disk_when_close_returns(spool: Spool) -> None:
    episode = begin(spool)
    add(episode, 10)
    episode.note("sticky")
    told = episode.close(success=True)
    requests = spooled(spool)
    assert [one.segment.length for one in requests] == [4, 4, 2]
    assert [len(one.packed_images["top"].frames) for one in requests] == [4, 4, 2]
    assert not requests[0].segment.images
    assert record_of(spool) == told
    assert (told.num_steps, told.success, told.notes, told.lease_id) == (10, True, ("sticky",), "0-abc")
    assert len(told.content_sha256) == len(told.frames_sha256) == 64


def test_who_took_over_from_when_to_when(spool: Spool) -> None:
    episode = begin(spool)
    for count, operator in ((2, ""), (3, "anna"), (1, ""), (2, "ben"), (1, "anna")):
        add(episode, count, operator=operator)
    episode.label(success=False, operator="anna")
    record = episode.close(success=True)
    assert record.interventions == (
        Intervention(operator="anna", first_step=2, end_step=5),
        Intervention(operator="ben", first_step=6, end_step=8),
        Intervention(operator="anna", first_step=8, end_step=9),
    )
    assert (record.success, record.labelled_by) == (False, "anna")
    mask = b"".join(one.segment.interventions.data[: one.segment.length] for one in spooled(spool))
    assert list(mask) == [0, 0, 1, 1, 1, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"images": {}}, "camera 'top' gave no frame at step 6.*check its cable"),
        ({"images": {"top": np.zeros((8, 16, 3), np.uint8)}}, "gave uint8 of shape"),
        ({"proprio": np.array([0, np.nan, 0], np.float32)}, "proprio is not finite in p1 at step 6"),
        ({"proprio": np.zeros(2, np.float32)}, "proprio has shape"),
    ],
)
def test_what_came_before_a_fault_can_be_used(spool: Spool, damage: dict, words: str) -> None:
    recorder = RobotRecorder(spool, SPEC, CONFIG)
    episode = recorder.begin(task="open", instruction="open", source="human")
    add(episode, 6)
    with pytest.raises(DataError, match=words):
        episode.add(replace(observation(), **damage), action=np.zeros(2, np.float32), reward=0.0)
    record = record_of(spool)
    assert (record.num_steps, record.success) == (6, False)
    assert record.partial
    with pytest.raises(DataError, match="is closed"):
        add(episode, 1)
    add(recorder.begin(task="open", instruction="open", source="human"), 3)
    assert recorder.is_recording


def test_rewards_and_actions_must_be_numbers(spool: Spool) -> None:
    episode = begin(spool)
    with pytest.raises(DataError, match="reward of step 0 is nan"):
        episode.add(observation(), action=np.zeros(2, np.float32), reward=float("nan"))
    episode = begin(spool)
    with pytest.raises(DataError, match="action is not finite in a1"):
        episode.add(observation(), action=np.array([0, np.inf], np.float32), reward=0.0)
    assert spooled(spool) == []


def test_an_episode_without_a_step_leaves_nothing(spool: Spool) -> None:
    assert begin(spool).close(success=True) is None
    assert spooled(spool) == []


def test_a_clock_that_jumps_is_noted_and_does_no_harm(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    episode = begin(spool)
    add(episode, 3)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 3600.0)
    add(episode, 3)
    record = episode.close(success=True)
    (problem,) = record.problems
    assert "the wall clock jumped by -3600.0 s at step 3" in problem
    assert (record.num_steps, 0 <= record.duration_s < 60) == (6, True)


def test_a_wrong_rate_is_noted(spool: Spool) -> None:
    episode = begin(spool, checks_rate=True)  # the contract says 10 Hz
    for _ in range(8):
        add(episode, 1)
        time.sleep(0.02)
    (problem,) = episode.close(success=True).problems
    assert "the contract says control_hz 10" in problem


def test_a_full_disk_ends_the_episode_with_what_is_on_it(tmp_path: Path) -> None:
    spool = Spool(tmp_path, SpoolConfig(max_bytes=6000, reserve_bytes=0))
    recorder = RobotRecorder(spool, SPEC, replace(CONFIG, jpeg_quality=0))
    episode = recorder.begin(task="open", instruction="open", source="human")
    with pytest.raises(ResourceMissing, match="is full"):
        add_slowly(episode)
    record = record_of(spool)
    assert record.num_steps == spool.steps_of(episode.episode_id) == 4
    assert "is full" in record.partial
    spool.close()


def test_a_refused_disk_is_said(spool: Spool) -> None:
    """SQLite's own words for a disk without room; with room again, the next episode is whole."""
    spool._database.execute("PRAGMA max_page_count = 1")
    episode = begin(spool, jpeg_quality=0)
    with pytest.raises(ResourceMissing, match=r"could not put .*full"):
        add_slowly(episode)
    spool._database.execute("PRAGMA max_page_count = 100000")
    episode = begin(spool)
    add(episode, 6)
    assert episode.close(success=True).num_steps == 6
    assert record_of(spool).episode_id == episode.episode_id


class Hand:
    """An operator that takes over at steps 3 and 4, and says success at step 6."""

    name = "anna"

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.steps = -1

    def command(self, observation: Observation):  # type: ignore[no-untyped-def]
        self.steps += 1
        return np.full(2, -0.5, np.float32) if self.steps in (3, 4) else None

    def verdict(self) -> bool | None:
        return True if self.steps == 6 else None

    def notes(self) -> list[str]:
        return ["slipped"] if self.steps == 4 else []


def test_a_person_may_take_the_robot_over(spool: Spool) -> None:
    spec = make_spec(proprio_dim=3, action_dim=2)
    robot = RecordedRobot(FakeEnv(spec), RobotRecorder(spool, spec, CONFIG), operator=Hand())
    robot.prepare(source="policy", policy_version=7)
    step = robot.reset(seed=0, task="go")
    while not step.is_last:
        robot.teach(np.full(2, 0.3, np.float32))
        step = robot.step(np.full(2, 0.2, np.float32))
    record = robot.finish()
    assert (record.num_steps, record.success, record.labelled_by, record.partial) == (7, True, "anna", "")
    assert record.interventions == (Intervention(operator="anna", first_step=3, end_step=5),)
    assert record.notes == ("step 4, anna: slipped",)
    first = spooled(spool)[0].segment
    actions = np.frombuffer(first.actions.data, "<f4").reshape(4, 2)[:, 0].tolist()
    targets = np.frombuffer(first.target_actions.data, "<f4").reshape(4, 2)[:, 0].tolist()
    assert actions == pytest.approx([0.2, 0.2, 0.2, -0.5])
    assert targets == pytest.approx([0.3, 0.3, 0.3, -0.5])
    assert first.policy_version == 7


def test_an_episode_that_is_stopped_is_partial(spool: Spool) -> None:
    spec = make_spec(proprio_dim=3, action_dim=2)
    robot = RecordedRobot(FakeEnv(spec), RobotRecorder(spool, spec, CONFIG))
    robot.reset(seed=0, task="go")
    robot.step(np.zeros(2, np.float32))
    assert robot.finish().partial == "stopped before its end"
    robot.reset(seed=0, task="go")
    assert robot.finish() is None


@pytest.mark.parametrize("settings", [{"robot_id": ""}, {"segment_steps": 0}, {"jpeg_quality": 101}])
def test_settings_are_checked(settings: dict) -> None:
    with pytest.raises(ConfigError):
        replace(CONFIG, **settings)
