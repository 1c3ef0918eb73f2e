import time

import numpy as np
import pytest

from vla_dist.core.errors import ConfigError, IntegrityError, NotFound, Unauthorised, Unreachable
from vla_dist.core.specs import CameraSpec
from vla_dist.replay.audit.catalogue import buffer_names, open_buffer
from vla_dist.replay.audit.inspection import AGE_BANDS, EpisodeColumns, limiter_in_words, survey
from vla_dist.replay.audit.monitoring import ReplayMonitor
from vla_dist.replay.config import Fifo, TableConfig
from vla_dist.replay.limiter import LimiterConfig, LimiterState
from vla_dist.testing.fakes import make_spec

PIXELS = make_spec(cameras=(CameraSpec(name="front", height=4, width=4),), max_episode_steps=20)


def fill(table, make_episode):
    """Returns of an episode of n steps are 0 + 1 + ... + (n - 1)."""
    for name, length, task, success, source, version in (
        ("a", 10, "go", True, "expert", 0),
        ("b", 6, "go", False, "policy", 1),
        ("c", 4, "stop", True, "policy", 2),
        ("d", 5, "stop", True, "policy", 2),
    ):
        segments = make_episode(name, length, task=task, success=success, source=source, policy_version=version)
        table.append_all(segments, timeout_s=5)
    table.append_all(make_episode("open", 12)[:2], timeout_s=5)


def numbers(groups):
    return {
        group.name: (group.episodes, group.steps, group.successes, group.mean_return, group.mean_length)
        for group in groups
    }


def test_what_is_stored_is_told_by_task_source_version_and_age(make_table, make_episode):
    table = make_table(capacity_steps=100)
    fill(table, make_episode)
    found = survey(table)
    assert (found.steps, found.episodes, found.open_episodes, found.open_steps) == (33, 4, 1, 8)
    assert (found.steps_inserted, found.steps_evicted, found.duplicates) == (33, 0, 0)
    assert found.fill == 0.33
    assert numbers(found.by_task) == {"go": (2, 16, 1, 30.0, 8.0), "stop": (2, 9, 2, 8.0, 4.5)}
    assert numbers(found.by_source) == {"expert": (1, 10, 1, 45.0, 10.0), "policy": (3, 15, 2, 31 / 3, 5.0)}
    assert [group.name for group in found.by_version] == ["2", "1", "0"]
    assert found.by_version[0].episodes == 2
    assert numbers(found.by_age) == {"< 1 min": (4, 25, 3, 19.0, 6.25)}
    assert (found.total.episodes, found.total.success_rate) == (4, 0.75)
    assert found.memory_bytes > 0
    assert found.memory_limit_bytes > found.memory_bytes
    assert found.image_memory_bytes == 0


def test_what_left_is_counted(make_table, make_episode):
    table = make_table(capacity_steps=50)
    table.append(make_episode("never-whole", 10)[0], timeout_s=5)
    for number in range(8):
        table.append_all(make_episode(f"e{number}", 10), timeout_s=5)
    table.append_all(make_episode("e7", 10), timeout_s=5)
    table.discard(next(entry["completion"] for entry in table.reader.entries(timeout_s=5)))
    found = survey(table)
    assert (found.steps_evicted, found.episodes_evicted, found.episodes_broken) == (44, 4, 1)
    assert (found.duplicates, found.episodes_discarded, found.open_episodes) == (3, 1, 0)


def test_an_empty_buffer_has_no_groups(make_table):
    found = survey(make_table())
    assert (found.steps, found.episodes, found.open_episodes, found.total.episodes) == (0, 0, 0, 0)
    assert found.by_task == found.by_source == found.by_version == found.by_age == ()
    assert found.total.success_rate == 0


def test_ages_fall_into_bands():
    ages = np.array([0, 59, 61, 599, 601, 3599, 3601, 86399, 86401, 1e9])
    zeros = np.zeros(len(ages), np.int64)
    columns = EpisodeColumns(
        completions=zeros,
        lengths=zeros + 1,
        returns=zeros,
        successes=zeros > 0,
        intervened=zeros > 0,
        completed_at_s=1e10 - ages,
        tasks=zeros,
        sources=zeros,
        versions=zeros,
    )
    assert [(group.name, group.episodes) for group in columns.by_age(1e10)] == [(name, 2) for name, _ in AGE_BANDS]


@pytest.mark.parametrize(
    ("drawable", "balance", "ratio", "expected"),
    [
        (10, 0, 2.0, "readers wait for data: 10 of min_steps 100 steps"),
        (100, -51, 2.0, "readers wait for writers: balance -51 is below -50 windows"),
        (100, 51, 2.0, "writers wait for readers: balance 51 is above 50 windows"),
        (100, 7, 2.0, "nobody waits: balance +7 is within 50 windows"),
        (100, 999, None, "nobody waits: no ratio is asked for"),
    ],
)
def test_the_limiter_says_who_waits_and_why(drawable, balance, ratio, expected):
    config = LimiterConfig(min_steps=100, samples_per_insert=ratio, error_buffer_steps=50)
    state = LimiterState(config=config, drawable_steps=drawable, balance=balance)
    assert limiter_in_words(state) == expected
    assert state.inserts_wait == expected.startswith("writers wait")
    assert state.samples_wait == expected.startswith("readers wait")


def test_each_table_tells_its_draws_and_waits(make_table, make_client, make_episode):
    limited = TableConfig(name="ratio", limiter=LimiterConfig(samples_per_insert=2.0, error_buffer_steps=1000))
    table = make_table(
        tables=(limited, TableConfig(name="free", max_draws=9), TableConfig(name="line", sampler=Fifo()))
    )
    fill(table, make_episode)
    table.sample(11, timeout_s=5)
    make_client(table, of="free").sample(3, timeout_s=5)
    ratio, free, line = survey(table).tables
    assert (ratio.name, ratio.sampler, ratio.sampled, ratio.wanted_samples_per_insert) == ("ratio", "uniform", 11, 2.0)
    assert ratio.samples_per_insert == 11 / 33
    assert (free.sampled, free.max_draws) == (3, 9)
    assert (line.sampler, line.drawable_steps) == ("fifo", 25)


def test_an_archive_that_is_behind_is_told(make_table, make_episode):
    table = make_table()
    fill(table, make_episode)
    assert not survey(table).archiving
    table.link.call([table.function("archiving", 1)], timeout_s=5)
    found = survey(table)
    assert (found.archiving, found.episodes_archived, found.episodes_unarchived) == (True, 0, 4)
    assert "wait for the archive" in found.tables[0].waiting


def test_reading_many_episodes_tells_how_far_it_is(make_table, make_episode):
    table = make_table(capacity_steps=10_000)
    segments = [make_episode(f"e{number}", 1)[0] for number in range(2100)]
    table.append_all(segments, timeout_s=30)
    seen = []
    assert survey(table, lambda done, total: seen.append((done, total))).total.episodes == 2100
    assert seen == [(1000, 2100), (2000, 2100)]


def test_buffers_are_found_by_name(make_server, make_table):
    url = make_server().url
    assert buffer_names(url) == []
    for name in ("two", "one"):
        make_table(url=url, name=name)
    assert buffer_names(url) == ["one", "two"]
    with pytest.raises(NotFound, match=r"no buffer 'three' .* it has one, two"):
        open_buffer(url, "three")
    assert buffer_names(url) == ["one", "two"]


def test_opening_creates_nothing_and_says_what_is_wrong(make_server, make_table, tmp_path):
    server, images = make_server(), make_server()
    with pytest.raises(NotFound, match="it has no buffer at all"):
        open_buffer(server.url, "absent")
    make_table(url=server.url, name="here")
    with pytest.raises(ConfigError, match="leave --images-redis-url out"):
        open_buffer(server.url, "here", images_url=images.url)
    make_table(url=server.url, name="apart", spec=PIXELS, images_url=images.url)
    with pytest.raises(ConfigError, match="give its URL as --images-redis-url"):
        open_buffer(server.url, "apart")
    open_buffer(server.url, "apart", images_url=images.url).close()
    with pytest.raises(Unreachable, match="does not answer"):
        buffer_names(f"unix://{tmp_path}/nobody.sock")
    with pytest.raises(ConfigError, match="not a Redis URL"):
        buffer_names("http://example.org")
    with pytest.raises(Unauthorised, match="refuses this user"):
        buffer_names(server.url.replace("client:", "client:x"))


def test_lost_counters_are_not_made_anew(make_table, make_episode, server):
    table = make_table()
    fill(table, make_episode)
    table.link.call([("DEL", table.keys.state)], timeout_s=5)
    with pytest.raises(IntegrityError, match="has lost its counters"):
        open_buffer(server.url, table.config.name)
    assert table.link.call([("EXISTS", table.keys.state)], timeout_s=5) == [0]


def test_a_monitor_sees_rates_and_what_is_stored_now(make_table, make_episode):
    table = make_table(capacity_steps=60)
    fill(table, make_episode)
    monitor = ReplayMonitor(table)
    first = monitor.look()
    assert (first.steps, first.episodes, first.open_episodes) == (33, 4, 1)
    assert first.rates["inserted"] == 0
    assert first.history["inserted"] == ()
    assert [(group.name, group.steps) for group in first.by_task] == [("go", 16), ("stop", 9)]
    assert [(group.name, group.episodes) for group in first.by_version] == [("2", 2), ("1", 1), ("0", 1)]
    assert 0 <= first.age_p50_s <= first.age_max_s < 60
    started = time.monotonic()
    for number in range(5):
        table.append_all(make_episode(f"e{number}", 10, task="more"), timeout_s=5)
    table.sample(20, timeout_s=5)
    second = monitor.look()
    passed = time.monotonic() - started
    assert second.rates["inserted"] >= 50 / (passed + 1)
    assert second.table_rates[0]["sampled"] == pytest.approx(0.4 * second.rates["inserted"])
    assert second.rates["evicted"] > 0
    assert len(second.history["inserted"]) == len(second.history["sampled"]) == 1
    stored = {entry["episode_id"] for entry in table.reader.entries(timeout_s=5)}
    assert sum(group.episodes for group in second.by_task) == len(stored) == second.episodes
    assert second.by_task[0].name == "more"


def test_a_monitor_of_an_empty_buffer(make_table):
    frame = ReplayMonitor(make_table()).look()
    assert (frame.steps, frame.episodes, frame.age_p50_s, frame.by_task) == (0, 0, 0.0, ())


def test_the_backlog_of_the_archive_is_watched(make_table, make_episode):
    table = make_table()
    fill(table, make_episode)
    monitor = ReplayMonitor(table)
    assert monitor.look().archive_backlog == 0
    table.link.call([table.function("archiving", 1)], timeout_s=5)
    table.link.call([table.function("adjust", -1, "archived", 1)], timeout_s=5)
    assert monitor.look().archive_backlog == 3
