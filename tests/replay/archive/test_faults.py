"""Whatever dies when, or is damaged where: every complete episode is in the archive once."""

import json
import random
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from archive.archive_checks import (
    Crash,
    CrashingFolder,
    archived_ids,
    crash,
    ids,
    parts,
)

from vla_dist.core.errors import (
    IntegrityError,
    NotFound,
    Unreachable,
)
from vla_dist.replay.archive.archiver import Archiver, read_archive
from vla_dist.replay.archive.export import export_episodes
from vla_dist.replay.archive.folder import ArchiveFolder
from vla_dist.replay.archive.part_reader import PartReader
from vla_dist.replay.archive.refill import RefillCounts, refill


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
