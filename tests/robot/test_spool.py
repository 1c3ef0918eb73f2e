"""What was put into a spool is there after any crash, whole or not at all."""

import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vla_dist.core.errors import DataError, ResourceMissing
from vla_dist.core.types import Segment
from vla_dist.protocol.records import Ack
from vla_dist.protocol.v1 import fleet_pb2
from vla_dist.robot.spool import Spool, SpoolConfig
from vla_dist.robot.spool_writer import spool_sink
from vla_dist.testing.fakes import make_segment, make_spec

SPEC = make_spec(proprio_dim=2, action_dim=1)
SMALL = SpoolConfig(max_bytes=100_000, reserve_bytes=0, retain_s=0.0)


def put_episode(spool: Spool, episode_id: str, *, num_segments: int = 2, num_steps: int = 4) -> None:
    take = spool_sink(spool)
    for index in range(num_segments):
        take(segment(episode_id, index, is_last=index == num_segments - 1, num_steps=num_steps))


def segment(episode_id: str, index: int, *, is_last: bool = False, num_steps: int = 4) -> Segment:
    return make_segment(
        SPEC, episode_id=episode_id, segment_index=index, is_last=is_last, success=is_last, num_steps=num_steps
    )


def upload_all(spool: Spool) -> list[fleet_pb2.UploadRequest]:
    """As an uploader would, with every segment stored."""
    sent = []
    while found := spool.pending():
        for one in found:
            sent.append(fleet_pb2.UploadRequest.FromString(one.request))
            spool.settle(Ack(episode_id=one.episode_id, segment_index=one.segment_index, status="stored"))
    return sent


def test_segments_go_out_in_order_and_leave_the_disk(tmp_path: Path) -> None:
    spool = Spool(tmp_path, SMALL)
    put_episode(spool, "a", num_segments=3)
    put_episode(spool, "b")
    sent = upload_all(spool)
    keys = [(one.segment.episode_id, one.segment.segment_index) for one in sent]
    assert keys == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1)]
    assert [one.HasField("episode") for one in sent] == [False, False, True, False, True]
    assert sent[2].episode.num_steps == 12
    assert sent[2].episode.content_sha256
    assert spool.metrics()["waiting_bytes"] == 0
    assert upload_all(spool) == []
    spool.close()


def test_the_newest_segment_of_a_running_episode_stays(tmp_path: Path) -> None:
    spool = Spool(tmp_path, SMALL)
    for index in range(3):
        spool.put(segment("a", index))
    assert [one.segment_index for one in spool.pending()] == [0, 1]
    spool.close()


def test_putting_again_changes_nothing_and_a_gap_is_refused(tmp_path: Path) -> None:
    spool = Spool(tmp_path, SMALL)
    spool.put(segment("a", 0))
    spool.put(segment("a", 0))
    with pytest.raises(DataError, match="not the next one: the spool holds 1"):
        spool.put(segment("a", 2))
    with pytest.raises(DataError, match="no record"):
        spool.put(segment("a", 1, is_last=True))
    assert spool.metrics()["waiting_segments"] == 1
    spool.close()


def record_until_killed(folder: str, told: object) -> None:
    spool = Spool(Path(folder), SMALL)
    for number in range(1000):
        for index in range(3):
            spool.put(segment(f"e{number}", index))
        told.send(number)  # type: ignore[attr-defined]


def test_a_killed_recorder_leaves_its_episode_as_a_partial_one(tmp_path: Path) -> None:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("spawn").Process(target=record_until_killed, args=(str(tmp_path), sender))
    child.start()
    while receiver.recv() < 2:
        pass
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join(10)
    spool = Spool(tmp_path, SMALL)
    assert len(spool.recovered) >= 3
    sent = upload_all(spool)
    whole = [one for one in sent if one.HasField("episode")]
    assert [one.episode.episode_id for one in whole][:3] == ["e0", "e1", "e2"]
    last = whole[0]
    assert (last.segment.segment_index, last.segment.is_last, last.segment.success) == (2, True, False)
    assert "ended before the episode did" in last.episode.partial
    assert last.episode.num_steps == 12
    spool.close()


@pytest.fixture
def ram_path(tmp_path: Path) -> Iterator[Path]:
    """Memory where there is some: tens of thousands of spools, whose syncs tell nothing here."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="vla-dist-test-", dir=shared) as folder:
        yield Path(folder)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("stride", [997, pytest.param(13, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_a_file_cut_at_any_byte_gives_back_only_whole_segments(
    ram_path: Path, stride: int, checkpointed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Both files of SQLite, cut everywhere: what is there afterwards is a part of what was put, and goes on working."""
    original = ram_path / "original"
    spool = Spool(original, SMALL)
    put_episode(spool, "a")
    put_episode(spool, "b")
    for index in range(2):
        spool.put(segment("c", index))
    if checkpointed:
        spool._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    copy = ram_path / "copy"
    shutil.copytree(original, copy)  # as the disk is when the power fails
    spool.close()
    known = {(name, index): segment(name, index) for name in "abc" for index in range(2)}
    untouched = {name: (copy / name).read_bytes() for name in ("spool.sqlite3", "spool.sqlite3-wal")}
    most, said = 0, 0
    for name, data in untouched.items():
        for cut in range(0, len(data) + 1, stride):
            folder = ram_path / "cut"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for other, content in untouched.items():
                (folder / other).write_bytes(content[:cut] if other == name else content)
            most = max(most, check_cut(folder, known, f"{name} cut to {cut} of {len(data)}"))
            said += "is damaged" in caplog.text
            caplog.clear()  # tens of thousands of cuts
    assert most == 6
    assert not checkpointed or said


def check_cut(folder: Path, known: dict, where: str) -> int:
    """How many segments were still there."""
    spool = Spool(folder, SMALL)
    counts: dict[str, int] = {}
    sent = upload_all(spool)
    for request in sent:
        one = request.segment
        assert one.proprio.data == known[one.episode_id, one.segment_index].proprio.tobytes(), where
        assert one.segment_index == counts.get(one.episode_id, 0), where
        counts[one.episode_id] = one.segment_index + 1
        if request.HasField("episode"):
            assert request.episode.num_segments == counts.pop(one.episode_id), where
    assert counts == {}, f"{where}: episodes without an end"
    put_episode(spool, "new")
    assert len(upload_all(spool)) == 2, where
    spool.close()
    return len(sent)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """SQLite does not look at what rows hold; the checksum does, and the episode ends before the damage."""
    spool = Spool(tmp_path / "original", SMALL)
    put_episode(spool, "a", num_segments=3)
    spool._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "original", copy)
    spool.close()
    data = bytearray((copy / "spool.sqlite3").read_bytes())
    place = data.find(segment("a", 1).proprio.tobytes())
    assert place > 0
    data[place] ^= 1
    (copy / "spool.sqlite3").write_bytes(data)
    spool = Spool(copy, SMALL)
    (only,) = upload_all(spool)
    assert (only.segment.segment_index, only.segment.is_last, only.episode.num_segments) == (0, True, 1)
    assert only.episode.partial
    spool.close()
    assert list(copy.glob("damaged-*/spool.sqlite3"))


def test_a_full_spool_refuses_new_episodes_and_keeps_the_old(tmp_path: Path) -> None:
    spool = Spool(tmp_path, SpoolConfig(max_bytes=2000, reserve_bytes=500, retain_s=0.0))
    with pytest.raises(ResourceMissing, match="is full"):
        put_episode(spool, "long", num_segments=100)
    spool.abandon("long")
    for number in range(5):
        put_episode(spool, f"e{number}")
    with pytest.raises(ResourceMissing, match="no new episode begins until"):
        spool.require_room()
    before = int(spool.metrics()["closed_episodes"])
    assert before > 0
    upload_all(spool)
    spool.require_room()
    spool.close()


def test_a_full_spool_may_drop_the_oldest_whole_episodes(tmp_path: Path) -> None:
    spool = Spool(tmp_path, SpoolConfig(max_bytes=3000, reserve_bytes=0, when_full="drop_oldest", retain_s=0.0))
    for number in range(20):
        put_episode(spool, f"e{number}")
    dropped = int(spool.metrics()["dropped_episodes"])
    assert dropped > 0
    names = {one.segment.episode_id for one in upload_all(spool)}
    assert names == {f"e{number}" for number in range(dropped, 20)}
    assert len((tmp_path / "dropped.log").read_text().splitlines()) == dropped
    spool.close()


def test_what_a_server_forgot_is_sent_again(tmp_path: Path) -> None:
    spool = Spool(tmp_path, SpoolConfig(max_bytes=100_000, reserve_bytes=0, retain_s=60.0))
    put_episode(spool, "a")
    first = upload_all(spool)
    assert spool.retained() == ["a"]
    spool.send_again(["a", "unknown"])
    assert upload_all(spool) == first
    spool.close()
    late = Spool(tmp_path, SMALL)
    time.sleep(0.01)
    put_episode(late, "b")
    upload_all(late)
    assert late.retained() == []
    late.close()


def test_refused_segments_stay_on_the_robot(tmp_path: Path) -> None:
    spool = Spool(tmp_path, SMALL)
    put_episode(spool, "a")
    spool.settle(Ack(episode_id="a", segment_index=0, status="quarantined", reason="a NaN"))
    assert (tmp_path / "refused" / "a-0.reason").read_text() == "a NaN"
    kept = fleet_pb2.UploadRequest.FromString((tmp_path / "refused" / "a-0.upload").read_bytes())
    assert kept.segment.segment_index == 0
    assert [one.segment.segment_index for one in upload_all(spool)] == [1]
    spool.close()


def test_a_spool_belongs_to_one_process(tmp_path: Path) -> None:
    spool = Spool(tmp_path, SMALL)
    with pytest.raises(ResourceMissing, match="used by another process"):
        Spool(tmp_path, SMALL)
    spool.close()
    Spool(tmp_path, SMALL).close()
