"""The archive: every complete episode once, whatever dies when; and back into a buffer."""

import dataclasses
import json
import random
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis
import simplejpeg
from pyarrow import fs

from vla_dist.core.errors import (
    ConfigError,
    ContractMismatch,
    IntegrityError,
    NotFound,
    ReplayWait,
    ResourceMissing,
    Unreachable,
)
from vla_dist.core.specs import CameraSpec
from vla_dist.data.image_codec import ImageEncoding
from vla_dist.replay.archive import parquet
from vla_dist.replay.archive.archiver import Archiver, read_archive
from vla_dist.replay.archive.export import ExportCounts, export_episodes
from vla_dist.replay.archive.folder import ArchiveFolder
from vla_dist.replay.archive.parquet import EpisodeFilter
from vla_dist.replay.archive.part_reader import PartReader
from vla_dist.replay.archive.refill import RefillCounts, refill
from vla_dist.replay.limiter import LimiterConfig
from vla_dist.replay.shards import ShardedReplayTable
from vla_dist.testing.fakes import make_spec

CAMERAS = make_spec(cameras=tuple(CameraSpec(name=name, height=16, width=24) for name in ("raw", "lz4", "jpeg")))
ENCODINGS = {"lz4": ImageEncoding(kind="lz4"), "jpeg": ImageEncoding(kind="jpeg", quality=80)}


class Crash(BaseException):
    """A process that ends here."""


class CrashingFolder(ArchiveFolder):
    """``at`` of it calls ``before`` or ``after`` when a file is written, and ``looking`` before one is looked for."""

    def __init__(self, path):
        super().__init__(fs.LocalFileSystem(), str(path))
        self.before = self.after = self.looking = lambda: None

    def has(self, name):
        self.looking()
        return super().has(name)

    def put(self, name, data):
        self.before()
        super().put(name, data)
        self.after()


def crash():
    raise Crash


def ids(episodes):
    return [segments[0].episode_id for segments in episodes]


def archived_ids(uri, **options):
    return ids(read_archive(uri, **options))


def parts(folder):
    return sorted(path.name for path in folder.glob("*.parquet"))


def assert_same_bits(found, expected):
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        for field in dataclasses.fields(mine):
            value, other = getattr(mine, field.name), getattr(theirs, field.name)
            if field.name == "images":
                assert set(value) == set(other)
                assert all(value[camera].tobytes() == other[camera].tobytes() for camera in other)
            elif isinstance(other, np.ndarray):
                assert (value.dtype, value.shape, value.tobytes()) == (other.dtype, other.shape, other.tobytes())
            else:
                assert (type(value), value) == (type(other), other), field.name


@pytest.fixture
def fill(make_episode, append_all):
    """Append episodes of 10 steps named by numbers."""

    def append(table, numbers, *, length=10, **changes):
        for number in numbers:
            append_all(table, make_episode(f"e{number}", length, spec=table.spec, seed=number, **changes))

    return append


@pytest.fixture
def client(server):
    with redis.Redis.from_url(server.url) as connection:
        yield connection


@pytest.fixture(params=["path", "uri", "store"])
def location(request, tmp_path):
    """Folders of each kind: a path, a URI, and a file system that only knows whole writes."""
    if request.param == "path":
        return tmp_path / "archive"
    if request.param == "uri":
        return (tmp_path / "an archive").as_uri()
    return ArchiveFolder(fs._MockFileSystem(), "bucket/archive")


def test_segments_come_back_bit_for_bit(location, make_table, make_episode, append_all):
    table = make_table(spec=CAMERAS, image_encodings=ENCODINGS)
    odd = np.array([-0.0, 1e-45, -1.17549435e-38, 3.4028235e38, 0.1], np.float32)
    for number, length in enumerate([9, 4, 1, 20]):
        segments = make_episode(f"e{number}", length, spec=CAMERAS, seed=number, success=True, source="human")
        changes = {
            "interventions": np.arange(4) % 2 == 0,
            "policy_version": 2**53 - 1,
            "instruction": "mach's auf, 開けて",
        }
        segments = [dataclasses.replace(s, proprio=np.resize(odd, s.proprio.shape), **changes) for s in segments]
        append_all(table, segments)
    archiver = Archiver(table, location)
    archiver.flush(timeout_s=20)
    expected = list(table.episodes())
    found = list(read_archive(location))
    assert ids(found) == ["e0", "e1", "e2", "e3"]
    for mine, theirs in zip(found, expected, strict=True):
        assert_same_bits(mine, theirs)


def test_anybody_can_read_the_files(tmp_path, make_table, fill):
    table = make_table(spec=CAMERAS, image_encodings=ENCODINGS)
    fill(table, range(3), success=True)
    Archiver(table, tmp_path).flush(timeout_s=20)
    whole = pq.read_table(tmp_path)
    assert whole.num_rows == 9
    assert {"episode_id", "robot_id", "task", "instruction", "source", "completion", "completed_at_s"} < set(
        whole.column_names
    )
    first, *_, last = whole.to_pylist()
    (episode, *_) = table.episodes()
    assert (first["episode_id"], first["segment_index"], first["source"], first["length"]) == ("e0", 0, "expert", 4)
    assert (last["episode_id"], last["is_last"], last["success"], last["length"]) == ("e2", True, True, 2)
    np.testing.assert_array_equal(np.array(first["actions"], np.float32), episode[0].actions)
    assert [len(last[name]) for name in ("proprio", "target_actions", "rewards", "interventions")] == [2] * 4
    assert len(first["image_raw"]) == 4 * 16 * 24 * 3
    end = np.frombuffer(first["image_jpeg"], "<u4", 1)[0]
    frame = simplejpeg.decode_jpeg(first["image_jpeg"][16 : 16 + end])
    np.testing.assert_array_equal(frame, episode[0].images["jpeg"][0])
    (path,) = tmp_path.glob("*.parquet")
    group = pq.read_metadata(path).row_group(0)
    packed = {group.column(n).path_in_schema: group.column(n).compression for n in range(group.num_columns)}
    assert {packed["image_jpeg"], packed["image_lz4"]} == {"UNCOMPRESSED"}
    assert {kind for name, kind in packed.items() if name not in ("image_jpeg", "image_lz4")} == {"ZSTD"}
    header = json.loads(pq.read_metadata(path).metadata[b"vla_dist"])
    assert (header["buffer"], header["num_steps"], header["completions"]) == (table.config.name, 4, [1, 2, 3])
    assert header["image_encodings"] == {"raw": "raw", "lz4": "lz4", "jpeg": "jpeg:80"}
    assert json.loads(header["spec_json"])["control_hz"] == CAMERAS.control_hz


def test_parts_are_written_when_they_are_due(tmp_path, make_table, fill):
    table = make_table()
    archiver = Archiver(table, tmp_path / "a", episodes_per_part=3, flush_after_s=1000)
    fill(table, range(7))
    metrics = [archiver.step(timeout_s=0) for _ in range(3)]
    assert [m["episodes"] for m in metrics] == [3, 6, 6], "the seventh waits for company"
    assert (metrics[-1]["parts"], metrics[-1]["behind"]) == (2, 1)
    archiver.flush(timeout_s=10)
    assert archiver.step(timeout_s=0)["behind"] == 0
    assert archived_ids(tmp_path / "a") == [f"e{n}" for n in range(7)]
    assert len(parts(tmp_path / "a")) == 3

    eager = make_table()
    fill(eager, [0])
    assert Archiver(eager, tmp_path / "b", flush_after_s=0).step(timeout_s=0)["episodes"] == 1


def test_large_episodes_make_parts_of_few(tmp_path, make_table, fill):
    table = make_table(spec=CAMERAS)
    fill(table, range(4))
    # Three segments of 4 frames of 3 cameras each, judged by the first one.
    archiver = Archiver(table, tmp_path, bytes_per_part=2 * 3 * 4 * 3 * 16 * 24 * 3, flush_after_s=1000)
    assert [archiver.step(timeout_s=0)["episodes"] for _ in range(3)] == [2, 4, 4]


def test_what_holds_eviction_up_waits_for_nobody(tmp_path, make_table, fill):
    table = make_table(capacity_steps=60)
    archiver = Archiver(table, tmp_path, flush_after_s=1000)
    fill(table, range(2))
    assert archiver.step(timeout_s=0)["episodes"] == 0
    fill(table, [2])
    assert archiver.step(timeout_s=0)["episodes"] == 3
    fill(table, [3])
    assert archiver.step(timeout_s=0)["episodes"] == 4, "it is not the next, but among the next few"


def test_eviction_waits_for_the_archive_and_loses_nothing(tmp_path, make_table, make_episode, fill):
    table = make_table(capacity_steps=41)
    archiver = Archiver(table, tmp_path)
    fill(table, range(4))
    with pytest.raises(ReplayWait, match=r"oldest episode is not archived yet, 4 are not; is the archiver running\?"):
        table.append(make_episode("e4", 10)[0], timeout_s=0.05)
    assert ids(table.episodes()) == ["e0", "e1", "e2", "e3"]
    archiver.step(timeout_s=0)
    fill(table, range(4, 8))
    archiver.flush(timeout_s=10)
    assert ids(table.episodes()) == ["e4", "e5", "e6", "e7"]
    assert archived_ids(tmp_path) == [f"e{n}" for n in range(8)]
    archiver.close()
    fill(table, range(8, 12))
    with pytest.raises(ReplayWait, match="archiver"):
        table.append(make_episode("e12", 10)[0], timeout_s=0.05)
    archiver.release()
    fill(table, [12])


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_death_around_the_write_neither_loses_nor_repeats(moment, tmp_path, make_table, fill):
    table, folder = make_table(), CrashingFolder(tmp_path)
    fill(table, range(3))
    dying = Archiver(table, folder)
    setattr(folder, moment, crash)
    with pytest.raises(Crash):
        dying.flush(timeout_s=10)
    assert table.state().archived == 0
    written = {path.name: path.read_bytes() for path in tmp_path.glob("*.parquet")}
    assert len(written) == (moment == "after")
    fill(table, range(3, 5))
    heir = Archiver(table, tmp_path)
    heir.step(timeout_s=0)
    assert table.state().archived == 3, "the plan that was left goes first, alone"
    heir.flush(timeout_s=10)
    assert archived_ids(tmp_path) == [f"e{n}" for n in range(5)]
    assert all((tmp_path / name).read_bytes() == data for name, data in written.items())
    assert len(parts(tmp_path)) == 2


def test_a_file_that_was_written_keeps_what_left_the_buffer_since(tmp_path, make_table, fill):
    table, folder = make_table(), CrashingFolder(tmp_path)
    fill(table, range(3))
    folder.after = crash
    with pytest.raises(Crash):
        Archiver(table, folder).flush(timeout_s=10)
    table.discard(2)
    Archiver(table, tmp_path).flush(timeout_s=10)
    assert archived_ids(tmp_path) == ["e0", "e1", "e2"]


def test_a_half_written_file_is_passed_over(tmp_path, make_table, fill, monkeypatch):
    table = make_table()
    fill(table, range(2))
    monkeypatch.setattr("os.fsync", lambda descriptor: crash())
    with pytest.raises(Crash):
        Archiver(table, tmp_path).flush(timeout_s=10)
    monkeypatch.undo()
    assert list(tmp_path.glob(".*.partial"))
    assert list(read_archive(tmp_path)) == []
    Archiver(table, tmp_path).flush(timeout_s=10)
    assert archived_ids(tmp_path) == ["e0", "e1"]


@pytest.mark.parametrize("looked_before", [False, True])
def test_an_archiver_that_slept_does_not_write_less_over_its_file(
    looked_before, tmp_path, make_table, make_client, fill
):
    table, folder = make_table(capacity_steps=41), CrashingFolder(tmp_path)
    sleeper, other = Archiver(table, folder, flush_after_s=0), Archiver(make_client(table), tmp_path)
    fill(table, range(4))
    kept = {}

    def others_go_on():
        other.flush(timeout_s=10)
        fill(table, range(4, 6))
        (path,) = tmp_path.glob("*.parquet")
        kept[path] = path.read_bytes()
        if looked_before:
            path.unlink()

    folder.looking = others_go_on
    assert sleeper.step(timeout_s=0)["episodes"] == 0
    ((path, data),) = kept.items()
    if looked_before:
        assert not path.exists(), "what it could still read is less than the file held"
        path.write_bytes(data)
    assert path.read_bytes() == data
    folder.looking = lambda: None
    sleeper.flush(timeout_s=10)
    assert archived_ids(tmp_path) == [f"e{n}" for n in range(6)]


def test_random_deaths_of_two_archivers_leave_each_episode_once(tmp_path, make_table, make_client, fill):
    dice = random.Random(7)
    table = make_table(capacity_steps=60)
    folders = [CrashingFolder(tmp_path) for _ in range(2)]
    archivers = [Archiver(make_client(table), f, episodes_per_part=3, flush_after_s=0) for f in folders]
    deaths = number = 0
    while number < 60:
        which = dice.randrange(2)
        for moment in ("before", "after", "looking"):
            setattr(folders[which], moment, crash if dice.random() < 0.25 else lambda: None)
        try:
            archivers[which].step(timeout_s=0)
        except Crash:
            deaths += 1
            archivers[which] = Archiver(make_client(table), folders[which], episodes_per_part=3, flush_after_s=0)
        for _ in range(dice.randrange(3)):
            if table.state().completions - table.state().archived < 4:
                fill(table, [number])
                number += 1
    Archiver(table, tmp_path).flush(timeout_s=20)
    assert deaths > 5
    assert archived_ids(tmp_path) == [f"e{n}" for n in range(number)]


@pytest.mark.parametrize("harm", ["change", "remove", "swap"])
def test_a_damaged_episode_is_named_and_the_archive_moves_on(harm, tmp_path, make_table, fill, client, caplog):
    table = make_table()
    fill(table, range(3))
    (_, entry, _) = table.reader.entries(timeout_s=5)
    key = table.keys.row(entry["digest"], 1)
    if harm == "change":
        row = bytearray(client.get(key))
        row[-7] ^= 1
        client.set(key, bytes(row))
    elif harm == "swap":
        client.set(key, client.get(table.keys.row(entry["digest"], 2)))
    else:
        client.delete(key)
    archiver = Archiver(table, tmp_path, flush_after_s=0)
    metrics = archiver.step(timeout_s=0)
    assert (metrics["episodes"], metrics["quarantined"], metrics["behind"]) == (2, 1, 0)
    assert archived_ids(tmp_path) == ["e0", "e2"]
    (sidecar,) = tmp_path.glob("*.quarantine.jsonl")
    (line,) = map(json.loads, sidecar.read_text().splitlines())
    assert line["episode_id"] == "e1"
    assert "segment" in line["reason"]
    assert "'e1'" in caplog.text
    counts = export_episodes(table, tmp_path / "export")
    assert (counts.written, counts.quarantined) == (2, 1)


def test_an_episode_discarded_after_the_plan_holds_nothing_up(tmp_path, make_table, fill):
    table, folder = make_table(), CrashingFolder(tmp_path)
    fill(table, range(3))
    folder.before = crash
    with pytest.raises(Crash):
        Archiver(table, folder).flush(timeout_s=10)
    assert table.discard(2)
    heir = Archiver(table, tmp_path)
    metrics = heir.step(timeout_s=0)
    assert (metrics["episodes"], metrics["missing"], metrics["behind"]) == (2, 1, 0)
    fill(table, range(3, 5))
    for completion in (4, 5):
        table.discard(completion)
    heir.flush(timeout_s=10)
    assert heir.step(timeout_s=0)["behind"] == 0
    assert archived_ids(tmp_path) == ["e0", "e2"]


def test_a_buffer_created_anew_goes_on_in_the_same_archive(tmp_path, make_table, make_client, fill, client, keys_of):
    table = make_table(capacity_steps=41)
    archiver = Archiver(table, tmp_path, flush_after_s=0)
    fill(table, range(2))
    archiver.step(timeout_s=0)
    client.delete(*keys_of(table))
    with pytest.raises(NotFound, match="is gone"):
        archiver.step(timeout_s=0)
    make_client(table)
    fill(table, range(2, 5))
    metrics = archiver.step(timeout_s=0)
    assert (metrics["episodes"], metrics["parts"], table.state().archiving) == (5, 2, True)
    assert Counter(archived_ids(tmp_path)) == {f"e{n}": 1 for n in range(5)}
    headers = [PartReader(ArchiveFolder.at(tmp_path), name).header for name in parts(tmp_path)]
    assert len({header.incarnation for header in headers}) == 2


def test_a_store_that_forgot_its_last_second_repeats_and_overwrites_nothing(
    tmp_path, make_table, fill, client, keys_of
):
    table = make_table()
    archiver = Archiver(table, tmp_path, flush_after_s=0)
    fill(table, range(2))
    archiver.step(timeout_s=0)
    kept = keys_of(table)
    for key in kept:
        client.copy(key, f"kept-{key}")
    fill(table, [2])
    archiver.step(timeout_s=0)
    client.delete(*keys_of(table))
    for key in kept:
        client.copy(f"kept-{key}", key)
    # e2 exists only in the archive now, and its completion is given to another episode.
    fill(table, [3])
    Archiver(table, tmp_path, flush_after_s=0).step(timeout_s=0)
    archiver.flush(timeout_s=10)
    assert Counter(archived_ids(tmp_path)) == {f"e{n}": 1 for n in range(4)}
    assert refill(table, tmp_path, timeout_s=5) == RefillCounts(inserted=1, duplicates=3, steps=10)
    archiver.flush(timeout_s=10)
    assert Counter(archived_ids(tmp_path)) == {f"e{n}": 1 for n in range(4)}
    client.delete(*(f"kept-{key}" for key in kept))


def test_a_payload_that_contradicts_its_episode_spoils_no_file(tmp_path, make_table, make_episode, fill, client):
    table = make_table()
    fill(table, range(2))
    (_, entry) = table.reader.entries(timeout_s=5)
    shorter = table.codec.encode(make_episode("e1", 2, seed=1)[0])
    client.set(table.keys.row(entry["digest"], 0), bytes(shorter.row))
    metrics = Archiver(table, tmp_path, flush_after_s=0).step(timeout_s=0)
    assert (metrics["episodes"], metrics["quarantined"]) == (1, 1)
    assert archived_ids(tmp_path) == ["e0"]


def test_a_refilled_episode_is_not_archived_again(tmp_path, make_table, fill):
    first, second = make_table(), make_table()
    fill(first, range(5))
    Archiver(first, tmp_path, episodes_per_part=2).flush(timeout_s=10)
    archiver = Archiver(second, tmp_path, episodes_per_part=3)
    assert refill(second, tmp_path, timeout_s=5) == RefillCounts(inserted=5, steps=50)
    fill(second, [5])
    archiver.flush(timeout_s=10)
    metrics = archiver.step(timeout_s=0)
    assert (metrics["duplicates"], metrics["episodes"], metrics["behind"]) == (5, 1, 0)
    assert archived_ids(tmp_path) == [f"e{n}" for n in range(6)]
    for mine, theirs in zip(second.episodes(), read_archive(tmp_path), strict=True):
        assert_same_bits(mine, theirs)


def test_an_episode_the_buffer_forgot_is_archived_once(tmp_path, make_table, fill):
    table = make_table(capacity_steps=41, remembered_episodes=1)
    archiver = Archiver(table, tmp_path, flush_after_s=0)
    for numbers in (range(4), range(4, 8), [0]):
        fill(table, numbers)
        archiver.step(timeout_s=0)
    assert "e0" in ids(table.episodes())
    assert Counter(archived_ids(tmp_path)) == {f"e{n}": 1 for n in range(8)}


def test_refill_takes_the_newest_that_fit_and_evicts_nothing(tmp_path, make_table, fill):
    source = make_table()
    fill(source, range(6))
    export_episodes(source, tmp_path, episodes_per_part=4)
    part_filled = make_table(capacity_steps=42)
    fill(part_filled, [5, 99])
    assert refill(part_filled, tmp_path, timeout_s=5) == RefillCounts(inserted=2, duplicates=1, left_out=3, steps=20)
    assert ids(part_filled.episodes()) == ["e5", "e99", "e3", "e4"]
    assert refill(part_filled, tmp_path, timeout_s=5) == RefillCounts(duplicates=3, left_out=3)
    few = make_table()
    assert refill(few, tmp_path, limit=2, timeout_s=5) == RefillCounts(inserted=2, left_out=4, steps=20)
    assert ids(few.episodes()) == ["e4", "e5"]
    assert refill(make_table(), tmp_path, limit=0, timeout_s=5) == RefillCounts(left_out=6)


def test_refilled_frames_are_those_that_were_stored(tmp_path, make_table, fill):
    source = make_table(spec=CAMERAS, image_encodings=ENCODINGS)
    fill(source, range(3))
    export_episodes(source, tmp_path)
    alike = make_table(spec=CAMERAS, image_encodings=ENCODINGS)
    assert refill(alike, tmp_path, timeout_s=5).inserted == 3
    for mine, theirs in zip(alike.reader.entries(timeout_s=5), source.reader.entries(timeout_s=5), strict=True):
        assert alike.reader.payload(mine, timeout_s=5) == source.reader.payload(theirs, timeout_s=5)
    otherwise = make_table(spec=CAMERAS, image_encodings={"raw": ImageEncoding(kind="lz4")})
    assert refill(otherwise, tmp_path, timeout_s=5).inserted == 3
    for mine, theirs in zip(otherwise.episodes(), source.episodes(), strict=True):
        assert_same_bits(mine, theirs)


def test_a_refill_that_had_to_wait_goes_on_where_it_was(tmp_path, make_table, fill):
    source = make_table()
    fill(source, range(6))
    export_episodes(source, tmp_path)
    limiter = LimiterConfig(min_steps=1, samples_per_insert=1.0, error_buffer_steps=30)
    table = make_table(limiter=limiter)
    with pytest.raises(ReplayWait, match="limiter"):
        refill(table, tmp_path, timeout_s=0.1)
    stored = len(ids(table.episodes()))
    assert 0 < stored < 6
    table.override_limiter(LimiterConfig(min_steps=1, samples_per_insert=None))
    counts = refill(table, tmp_path, timeout_s=5)
    assert (counts.inserted, counts.duplicates) == (6 - stored, stored)
    assert ids(table.episodes()) == [f"e{n}" for n in range(6)]


def test_filters_choose_episodes_by_what_they_are(tmp_path, make_table, fill):
    table = make_table()
    fill(table, [0], task="open", success=True)
    fill(table, [1], task="close", source="policy", policy_version=3)
    fill(table, [2], task="close", source="policy", policy_version=5, success=True)
    fill(table, [3], task="push", source="human")
    export_episodes(table, tmp_path, episodes_per_part=2)

    def found(**wanted):
        where = EpisodeFilter(**wanted)
        chosen = archived_ids(tmp_path, where=where)
        exported = tmp_path / "again" / "-".join(map(str, wanted.values()))
        assert export_episodes(table, exported, where=where).written == len(chosen)
        assert archived_ids(exported) == chosen
        other = make_table()
        assert refill(other, tmp_path, where=where, timeout_s=5).inserted == len(chosen)
        assert ids(other.episodes()) == chosen
        return chosen

    assert found(tasks=["close", "push"]) == ["e1", "e2", "e3"]
    assert found(sources=["policy"]) == ["e1", "e2"]
    assert found(success=True) == ["e0", "e2"]
    assert found(success=False) == ["e1", "e3"]
    assert found(min_policy_version=1, max_policy_version=4) == ["e1"]
    assert found(tasks=["nothing"]) == []
    with pytest.raises(ConfigError, match=r"\['robot'\] must be among expert, policy, human"):
        EpisodeFilter(sources=["robot"])


def test_an_export_holds_what_the_folder_lacks(location, make_table, fill):
    table = make_table()
    fill(table, range(5))
    assert export_episodes(table, location, limit=2) == ExportCounts(written=2, steps=20, parts=1)
    assert export_episodes(table, location, episodes_per_part=2) == ExportCounts(
        written=3, already_there=2, steps=30, parts=2
    )
    assert export_episodes(table, location) == ExportCounts(already_there=5)
    assert archived_ids(location) == [f"e{n}" for n in range(5)]
    assert not table.state().archiving, "nothing waits for an export"


def test_another_contract_is_refused_with_every_difference(tmp_path, make_table, fill):
    table = make_table()
    fill(table, [0])
    export_episodes(table, tmp_path)
    other = make_table(spec=make_spec(action_dim=3, max_episode_steps=15))
    calls = (Archiver, export_episodes, lambda table, uri: refill(table, uri, timeout_s=5))
    for call in calls:
        with pytest.raises(ContractMismatch, match=r"max_episode_steps 15 against 20; action has 3 entries against 2"):
            call(other, tmp_path)
        with pytest.raises(ConfigError, match=r"segments of 4 steps, .* of 5; use another folder"):
            call(make_table(num_steps=5), tmp_path)
    assert not other.state().archiving
    assert other.state().inserted == 0


def test_damaged_and_foreign_files_are_named_and_can_be_skipped(tmp_path, make_table, fill):
    table = make_table()
    fill(table, range(6))
    export_episodes(table, tmp_path, episodes_per_part=2)
    _, second, _ = parts(tmp_path)
    whole = (tmp_path / second).read_bytes()
    pq.write_table(pa.table({"a": [1]}), tmp_path / "0-foreign.parquet")
    with pytest.raises(IntegrityError, match=r"0-foreign\.parquet is damaged or no archive of episodes"):
        list(read_archive(tmp_path))
    (tmp_path / "0-foreign.parquet").unlink()
    (tmp_path / "notes.txt").write_text("not ours")
    at = whole.index(b"\x28\xb5\x2f\xfd") + 12  # Within the first page that zstd made.
    for harmed in (whole[: len(whole) // 2], whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :], b""):
        (tmp_path / second).write_bytes(harmed)
        reading = read_archive(tmp_path)
        assert ids([next(reading), next(reading)]) == ["e0", "e1"]
        with pytest.raises(IntegrityError, match=second):
            next(reading)
        assert archived_ids(tmp_path, on_error="skip") == ["e0", "e1", "e4", "e5"]
        with pytest.raises(IntegrityError, match=second):
            refill(make_table(), tmp_path, timeout_s=5)
        assert refill(make_table(), tmp_path, timeout_s=5, on_error="skip").inserted == 4
    (tmp_path / second).write_bytes(whole)
    assert archived_ids(tmp_path) == [f"e{n}" for n in range(6)]


def test_every_flipped_byte_is_noticed_or_harmless(tmp_path, make_table, fill):
    table = make_table()
    fill(table, [0])
    export_episodes(table, tmp_path)
    (path,) = tmp_path.glob("*.parquet")
    (expected,) = read_archive(tmp_path)
    whole, dice = path.read_bytes(), random.Random(3)
    noticed = 0
    for at in dice.sample(range(len(whole)), 150):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << dice.randrange(8))]) + whole[at + 1 :])
        try:
            (found,) = read_archive(tmp_path)
        except IntegrityError:
            noticed += 1
        else:
            for mine, theirs in zip(found, expected, strict=True):
                assert all(np.array_equal(getattr(mine, n), getattr(theirs, n)) for n in ("proprio", "actions"))
    assert noticed > 50


def test_reading_holds_one_row_group(tmp_path, make_table, fill, monkeypatch):
    monkeypatch.setattr(parquet, "_ROW_GROUP_BYTES", 2000)
    table = make_table()
    fill(table, range(6), task="open")
    fill(table, range(6, 12), task="close")
    Archiver(table, tmp_path).flush(timeout_s=10)
    (name,) = parts(tmp_path)
    with PartReader(ArchiveFolder.at(tmp_path), name) as part:
        assert part.num_row_groups >= 4
    read, original = [], pq.ParquetFile.read_row_group

    def spy(self, group, columns):
        read.append((group, "actions" in columns))
        return original(self, group, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", spy)
    reading = read_archive(tmp_path)
    assert ids([next(reading)]) == ["e0"]
    assert read == [(0, False), (0, True)]
    reading.close()
    read.clear()
    assert archived_ids(tmp_path, where=EpisodeFilter(tasks=["close"])) == [f"e{n}" for n in range(6, 12)]
    assert (0, True) not in read, "steps of row groups without a wanted episode stay where they are"


def test_a_store_that_fails_is_reported_and_tried_again(tmp_path, make_table, fill):
    table = make_table()
    fill(table, range(2))
    folder = tmp_path / "archive"
    archiver = Archiver(table, folder, flush_after_s=0)
    folder.rmdir()
    with pytest.raises(Unreachable, match=r"archive .* is gone"):
        archiver.step(timeout_s=0)
    folder.mkdir()
    assert archiver.step(timeout_s=0)["episodes"] == 2
    assert archived_ids(folder) == ["e0", "e1"]
    with pytest.raises(NotFound, match="no archive at"):
        list(read_archive(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    with pytest.raises(Unreachable, match=r"archive .* could not be made"):
        Archiver(table, tmp_path / "file")


def test_places_and_settings_that_cannot_work_are_refused(make_table, tmp_path):
    with pytest.raises(ConfigError, match=r"'ftp://host/x' must be a path or a URI such as"):
        ArchiveFolder.at("ftp://user:secret@host/x?password=secret")
    with pytest.raises((ResourceMissing, ConfigError), match="hdfs") as caught:
        ArchiveFolder.at("hdfs://host:1/x")
    assert "\n" not in str(caught.value)
    for settings in ({"episodes_per_part": 0}, {"bytes_per_part": 0}, {"flush_after_s": -1.0}):
        with pytest.raises(ConfigError, match="must"):
            Archiver(make_table(), tmp_path, **settings)


def test_a_flush_that_is_not_over_in_time_says_so(tmp_path, make_table, fill):
    table = make_table()
    fill(table, range(3))
    archiver = Archiver(table, tmp_path, episodes_per_part=1)
    with pytest.raises(ReplayWait, match=r"of 3 episodes were not archived in .* within 0\.0 s"):
        archiver.flush(timeout_s=0.0)
    archiver.flush(timeout_s=10)
    assert archived_ids(tmp_path) == ["e0", "e1", "e2"]


def test_the_shards_of_a_buffer_share_an_archive(tmp_path, make_server, make_table, make_episode):
    config = dataclasses.replace(make_table().config, name="sharded", capacity_steps=200)
    urls = [make_server().url for _ in range(2)]
    sharded = ShardedReplayTable(urls, make_spec(), config)
    segments = [s for number in range(12) for s in make_episode(f"e{number}", 10, seed=number)]
    sharded.append_all(segments, timeout_s=5)
    for shard in sharded.shards:
        Archiver(shard, tmp_path / "a").flush(timeout_s=10)
    everything = {f"e{number}": 1 for number in range(12)}
    assert Counter(archived_ids(tmp_path / "a")) == everything
    assert export_episodes(sharded, tmp_path / "b", episodes_per_part=4).written == 12
    assert export_episodes(sharded, tmp_path / "b") == ExportCounts(already_there=12)
    assert Counter(archived_ids(tmp_path / "b")) == everything
    assert refill(sharded, tmp_path / "b", timeout_s=5) == RefillCounts(duplicates=12)
    whole, again = make_table(), ShardedReplayTable(urls, make_spec(), dataclasses.replace(config, name="again"))
    for table in (whole, again):
        assert refill(table, tmp_path / "a", timeout_s=5) == RefillCounts(inserted=12, steps=120)
        assert Counter(ids(table.episodes())) == everything
    sharded.close()
    again.close()
