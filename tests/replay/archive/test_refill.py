"""Out of the archive: back into a buffer, filtered, or exported."""

from collections import Counter

import pytest
from archive.archive_checks import CAMERAS, ENCODINGS, archived_ids, assert_same_bits, ids

from vla_dist.core.errors import (
    ConfigError,
    ContractMismatch,
    ReplayWait,
)
from vla_dist.data.image_codec import ImageEncoding
from vla_dist.replay.archive.archiver import Archiver, read_archive
from vla_dist.replay.archive.export import ExportCounts, export_episodes
from vla_dist.replay.archive.parquet import EpisodeFilter
from vla_dist.replay.archive.refill import RefillCounts, refill
from vla_dist.replay.limiter import LimiterConfig
from vla_dist.testing.fakes import make_spec


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
