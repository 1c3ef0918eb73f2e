"""Segments are stored once; bad ones are kept aside with a reason; a replay that is busy costs nothing."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from vla_dist.core.errors import ConfigError, IntegrityError, ReplayWait, Unreachable
from vla_dist.core.specs import CameraSpec
from vla_dist.core.types import Segment
from vla_dist.protocol.conversion import encode_segment
from vla_dist.protocol.fleet_conversion import encode_episode
from vla_dist.protocol.fleet_records import EpisodeRecord, RobotClaim
from vla_dist.protocol.v1 import fleet_pb2
from vla_dist.robot.frames import FramePacker
from vla_dist.serving.ingest import FleetIngest, IngestConfig
from vla_dist.serving.quarantine import QuarantineFolder
from vla_dist.testing.fakes import make_segment, make_spec
from vla_dist.testing.serving import ListTable

SPEC = make_spec()


def upload(segment: Segment) -> fleet_pb2.UploadRequest:
    return fleet_pb2.UploadRequest(segment=encode_segment(segment))


@pytest.fixture
def table() -> ListTable:
    return ListTable()


@pytest.fixture
def quarantine(tmp_path: Path) -> QuarantineFolder:
    return QuarantineFolder(tmp_path / "quarantine", max_bytes=2000)


@pytest.fixture
def ingest(table: ListTable, quarantine: QuarantineFolder) -> Iterator[FleetIngest]:
    ingest = FleetIngest(
        table,
        SPEC,
        IngestConfig(num_steps=8),
        quarantine=quarantine,
        commands=lambda robot_id: "drain" if robot_id == "tired" else "continue",
    )
    yield ingest
    ingest.shut_down()


async def test_stored_once(ingest: FleetIngest, table: ListTable) -> None:
    segment = make_segment(SPEC, episode_id="e")
    statuses = [(await ingest.receive(upload(segment))).status for _ in range(2)]
    assert statuses == ["stored", "duplicate"]
    assert np.array_equal(table.segments["e", 0].proprio, segment.proprio)


async def test_a_bad_segment_is_quarantined_with_its_reason(
    ingest: FleetIngest, table: ListTable, quarantine: QuarantineFolder
) -> None:
    bad = upload(make_segment(SPEC, episode_id="e", num_steps=4))
    for _ in range(2):
        ack = await ingest.receive(bad)
    assert ack.key == ("e", 0)
    assert ack.status == "quarantined"
    assert "shape (4, 5), expected (8, 5)" in ack.reason
    assert not table.segments
    (kept,) = quarantine.folder.glob("*.segment")
    assert fleet_pb2.UploadRequest.FromString(kept.read_bytes()) == bad
    assert kept.with_suffix(".reason").read_text() == ack.reason


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("length", 9, "must be within 1..8"),
        ("length", 3, "is not the last of its episode"),
        ("episode_id", "x" * 65, "1 to 64 ASCII"),
        ("source", 17, "source is 17"),
        ("task", "t" * 2000, "task has 2000 bytes"),
    ],
)
async def test_headers_are_checked(ingest: FleetIngest, field: str, value: object, words: str) -> None:
    message = upload(make_segment(SPEC, episode_id="e"))
    setattr(message.segment, field, value)
    ack = await ingest.receive(message)
    assert (ack.status, words in ack.reason) == ("quarantined", True), ack.reason


@pytest.mark.parametrize("error", [ReplayWait("learner is behind"), Unreachable("redis is away")])
async def test_what_cannot_be_stored_now_is_asked_for_again(
    ingest: FleetIngest, table: ListTable, error: Exception
) -> None:
    table.fail_with.append(error)
    message = upload(make_segment(SPEC, episode_id="e"))
    first, second = await ingest.receive(message), await ingest.receive(message)
    assert (first.status, first.reason, second.status) == ("retry", str(error), "stored")


async def test_the_tables_own_refusal_is_final(ingest: FleetIngest, table: ListTable) -> None:
    table.fail_with.append(IntegrityError("segment 0 is missing"))
    ack = await ingest.receive(upload(make_segment(SPEC, episode_id="e")))
    assert (ack.status, ack.reason) == ("quarantined", "segment 0 is missing")


async def test_commands_come_with_the_heartbeat(ingest: FleetIngest) -> None:
    assert await ingest.heartbeat("tired", {"steps": 1}) == "drain"
    assert await ingest.heartbeat("fresh", {}) == "continue"


async def test_a_stranger_cannot_speak_for_another_robot(ingest: FleetIngest, table: ListTable) -> None:
    claim = RobotClaim(robot_id="robot-7", spool_id="s")
    ack = await ingest.receive(upload(make_segment(SPEC, episode_id="e")), claim=claim)
    assert ack.status == "quarantined"
    assert "names robot 'robot-0', it was sent by 'robot-7'" in ack.reason
    assert not table.segments


async def test_a_mislabelled_task_is_named_with_the_nearest(table: ListTable) -> None:
    ingest = FleetIngest(table, SPEC, IngestConfig(num_steps=8, tasks=("drawer-open", "push")))
    ack = await ingest.receive(upload(make_segment(SPEC, episode_id="e", task="drawr-open")))
    ingest.shut_down()
    assert ack.status == "quarantined"
    assert "did the robot mean 'drawer-open'?" in ack.reason


async def test_a_record_must_fit_its_last_segment(ingest: FleetIngest, table: ListTable) -> None:
    request = upload(make_segment(SPEC, episode_id="e", is_last=True))
    record = EpisodeRecord(
        episode_id="other", robot_id="robot-0", task="go", source="expert", num_steps=8, num_segments=1, success=False
    )
    request.episode.CopyFrom(encode_episode(record))
    ack = await ingest.receive(request)
    assert (ack.status, "must agree" in ack.reason) == ("quarantined", True)
    assert not table.segments


async def test_jpeg_frames_are_decoded_and_checked(table: ListTable) -> None:
    spec = make_spec(cameras=(CameraSpec(name="top", height=16, width=24),))
    ingest = FleetIngest(table, spec, IngestConfig(num_steps=8))
    segment = make_segment(spec, episode_id="e", length=5, is_last=True)
    packed = FramePacker(quality=95).pack(segment)
    request = fleet_pb2.UploadRequest(segment=encode_segment(replace(segment, images={})), packed_images=packed)
    assert (await ingest.receive(request)).status == "stored"
    stored = table.segments["e", 0].images["top"]
    assert stored.shape == (8, 16, 24, 3)
    assert not stored[5:].any()
    for damage, words in (
        (lambda p: p.frames.pop(), "has 4 frames, the segment 5 steps"),
        (lambda p: p.frames.__setitem__(2, b"no picture"), "frame 2 is no JPEG"),
        (lambda p: p.frames.__setitem__(2, p.frames[2][: len(p.frames[2]) // 2]), "a frame that is not jpeg"),
        (lambda p: setattr(p, "encoding", "lz4"), "packed frames are jpeg:QUALITY"),
        (lambda p: p.frames.__setitem__(1, _jpeg(32, 24)), "is 32 x 24, the spec says 16 x 24"),
    ):
        broken = fleet_pb2.UploadRequest.FromString(request.SerializeToString())
        broken.segment.episode_id = "broken"
        damage(broken.packed_images["top"])
        ack = await ingest.receive(broken)
        assert (ack.status, words in ack.reason) == ("quarantined", True), ack.reason
    ingest.shut_down()


def _jpeg(height: int, width: int) -> bytes:
    return simplejpeg.encode_jpeg(np.zeros((height, width, 3), np.uint8))


def test_a_full_quarantine_keeps_the_first(quarantine: QuarantineFolder) -> None:
    assert quarantine.keep(b"a" * 1500, reason="one")
    assert not quarantine.keep(b"b" * 1500, reason="two")
    assert quarantine.keep(b"a" * 1500, reason="one")
    again = QuarantineFolder(quarantine.folder, max_bytes=2000)
    assert not again.keep(b"c" * 1500, reason="three")
    assert len(list(quarantine.folder.iterdir())) == 2


@pytest.mark.parametrize("settings", [{"num_steps": 0}, {"append_timeout_s": 0.0}, {"num_threads": 0}])
def test_settings_are_checked(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        replace(IngestConfig(), **settings)  # type: ignore[arg-type]
