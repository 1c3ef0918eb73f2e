"""The archive: every complete episode once; what is in its files, and what holds whom up."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import simplejpeg
from archive.archive_checks import (
    CAMERAS,
    ENCODINGS,
    archived_ids,
    assert_same_bits,
    ids,
    parts,
)

from vla_dist.core.errors import (
    ConfigError,
    ReplayWait,
    ResourceMissing,
)
from vla_dist.replay.archive import parquet
from vla_dist.replay.archive.archiver import Archiver, read_archive
from vla_dist.replay.archive.export import ExportCounts, export_episodes
from vla_dist.replay.archive.folder import ArchiveFolder
from vla_dist.replay.archive.parquet import EpisodeFilter
from vla_dist.replay.archive.part_reader import PartReader
from vla_dist.replay.archive.refill import RefillCounts, refill
from vla_dist.replay.shards import ShardedReplayTable
from vla_dist.testing.fakes import make_spec


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
