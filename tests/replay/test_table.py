"""Appending: exactly once, all or nothing, from any thread or process."""

import multiprocessing
import threading
import time

import numpy as np
import pytest
import redis

from vla_dist.core.errors import ConfigError, DataError, ReplayWait, Unreachable
from vla_dist.core.specs import CameraSpec
from vla_dist.core.types import Segment
from vla_dist.replay.config import TableConfig
from vla_dist.replay.limiter import LimiterConfig
from vla_dist.replay.table import RedisReplayTable
from vla_dist.testing.fakes import make_segment, make_spec

ARRAYS = ("proprio", "actions", "target_actions", "rewards", "interventions")


def assert_same_segment(found: Segment, expected: Segment):
    for name in Segment.__dataclass_fields__:
        mine, theirs = getattr(found, name), getattr(expected, name)
        if name in ARRAYS:
            np.testing.assert_array_equal(mine[: expected.length], theirs[: expected.length])
        elif name == "images":
            assert set(mine) == set(theirs)
            for camera, frames in theirs.items():
                np.testing.assert_array_equal(mine[camera][: expected.length], frames[: expected.length])
        else:
            assert mine == theirs, name


def test_episodes_come_back_whole_and_in_order(make_table, make_episode, append_all):
    table = make_table()
    stored = [make_episode(f"e{i}", length, seed=i, success=True) for i, length in enumerate([9, 4, 1, 20])]
    for segments in stored:
        assert append_all(table, segments) == ["inserted"] * len(segments)
    append_all(table, make_episode("open", 9)[:2])
    found = list(table.episodes())
    assert [segments[0].episode_id for segments in found] == ["e0", "e1", "e2", "e3"]
    for segments, expected in zip(found, stored, strict=True):
        for mine, theirs in zip(segments, expected, strict=True):
            assert_same_segment(mine, theirs)
    assert [segments[0].episode_id for segments in table.episodes(limit=2)] == ["e0", "e1"]
    assert list(table.episodes(limit=0)) == []


def test_more_episodes_than_one_scan_are_all_given(make_table, make_episode, append_all):
    table = make_table()
    for number in range(70):
        append_all(table, make_episode(f"e{number}", 1))
    assert [s[0].episode_id for s in table.episodes()] == [f"e{number}" for number in range(70)]
    assert len(list(table.episodes(limit=40))) == 40


def test_appending_again_stores_once(make_table, make_episode, append_all, server):
    table = make_table()
    segments = make_episode("e", 10)
    assert append_all(table, [segments[0], *segments, *segments]) == [
        "inserted",
        *["duplicate", "inserted", "inserted"],
        *["duplicate"] * 3,
    ]
    stats = table.stats()
    assert (stats.num_steps, stats.steps_inserted, stats.duplicates, stats.num_episodes) == (10, 10, 4, 1)
    with redis.Redis.from_url(server.url) as client:
        assert list(client.scan_iter(table._prefix + "stage:*")) == [], "nor does a duplicate's payload stay"


def test_a_lost_answer_is_asked_for_again(make_table, make_episode, append_all, monkeypatch):
    table = make_table()
    link, exchange = table._link, table._link._exchange
    lost = []

    def lose_first(commands, *, timeout_s):
        replies = exchange(commands, timeout_s=timeout_s)
        if not lost:
            lost.append(replies)
            raise Unreachable("the answer was lost on its way")
        return replies

    monkeypatch.setattr(link, "_exchange", lose_first)
    append_all(table, make_episode("e", 3))
    assert lost[0][-1] == [b"OK"], "the first try was applied"
    assert (table.stats().num_steps, table.stats().steps_inserted) == (3, 3)
    assert table.stats().num_episodes == 1


def test_segments_may_come_in_any_order(make_table, make_episode):
    table = make_table()
    segments = make_episode("e", 10)
    for index in (2, 0):
        table.append(segments[index], timeout_s=5.0)
    assert not table.has_episode("e")
    assert list(table.episodes()) == []
    table.append(segments[1], timeout_s=5.0)
    assert table.has_episode("e")
    (found,) = table.episodes()
    for mine, theirs in zip(found, segments, strict=True):
        assert_same_segment(mine, theirs)


def test_a_segment_beyond_the_last_one_is_refused(make_table, make_episode, append_all):
    table = make_table()
    segments = make_episode("e", 12)
    append_all(table, segments[:1])
    append_all(table, [make_episode("e", 8)[1]])
    with pytest.raises(DataError, match=r"e/2 .* contradicts index 1.*its own id"):
        table.append(segments[2], timeout_s=5.0)
    other = make_episode("other", 12)
    append_all(table, [other[2]])
    with pytest.raises(DataError, match="contradicts"):
        table.append(make_episode("other", 8)[1], timeout_s=5.0)
    assert table.stats().num_steps == 8 + 4


def test_an_absurd_segment_index_is_refused(make_table):
    table = make_table()
    with pytest.raises(DataError, match="segment_index 65536"):
        table.append(make_segment(table.spec, episode_id="e", segment_index=65536, num_steps=4), timeout_s=5.0)


def test_a_writer_that_dies_after_staging_leaves_nothing(make_table, make_episode, append_all, server):
    table = make_table()
    (segment,) = make_episode("e", 3)
    staging = table._stage_commands("dead", table.codec.encode(segment))
    table._link.call([(*command[:3], "PX", 200) for command in staging], timeout_s=5.0)
    with redis.Redis.from_url(server.url) as client:
        pattern = table._prefix + "stage:*"
        assert len(list(client.scan_iter(pattern))) == 1
        assert not table.has_episode("e")
        assert table.stats().num_steps == 0
        assert append_all(table, [segment]) == ["inserted"]
        time.sleep(0.3)
        assert list(client.scan_iter(pattern)) == []
    assert_same_segment(next(table.episodes())[0], segment)


def test_stored_rows_do_not_expire_with_their_staging(make_table, make_episode, append_all, server):
    table = make_table()
    append_all(table, make_episode("e", 10))
    with redis.Redis.from_url(server.url) as client:
        keys = list(client.scan_iter(table._prefix + "*"))
        assert sum(b":row:" in key for key in keys) == 3
        assert [client.pttl(key) for key in keys] == [-1] * len(keys)


def write_episodes(url, name, writer, num_episodes):
    spec = make_spec(max_episode_steps=20)
    table = RedisReplayTable(url, spec, TableConfig(name=name, num_steps=4, context_steps=6, capacity_steps=1000))
    for number in range(num_episodes):
        for index in range(2):
            # Both writers also send an episode of the same name.
            for episode_id in (f"{writer}-{number}", f"shared-{number}"):
                segment = make_segment(
                    spec, episode_id=episode_id, segment_index=index, num_steps=4, is_last=index == 1, seed=number
                )
                table.append(segment, timeout_s=10.0)
    table.close()


def test_two_processes_write_at_once(make_table, server):
    table = make_table()
    context = multiprocessing.get_context("spawn")
    writers = [
        context.Process(target=write_episodes, args=(server.url, table.config.name, writer, 30)) for writer in "ab"
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
        assert writer.exitcode == 0
    stats = table.stats()
    assert stats.num_episodes == 90
    assert stats.num_steps == stats.steps_inserted == 90 * 8
    assert stats.duplicates == 60
    found = {segments[0].episode_id: segments for segments in table.episodes()}
    assert set(found) == {f"{writer}-{n}" for writer in ("a", "b", "shared") for n in range(30)}
    expected = make_segment(table.spec, episode_id="a-7", segment_index=1, num_steps=4, is_last=True, seed=7)
    assert_same_segment(found["a-7"][1], expected)


def test_threads_may_share_a_table(make_table, make_episode, append_all):
    table = make_table()
    append_all(table, make_episode("first", 10))
    errors = []

    def guarded(work):
        try:
            for number in range(25):
                work(number)
        except Exception as error:
            errors.append(error)

    def read(_):
        batch = table.sample(8, timeout_s=5.0)
        assert (batch.rewards[:, -1] == batch.timesteps[:, -1]).all(), "rewards count the steps"

    work = [lambda n, w=w: append_all(table, make_episode(f"{w}-{n}", 10, seed=n)) for w in "ab"]
    threads = [threading.Thread(target=guarded, args=(job,)) for job in [*work, read, read]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert table.stats().num_episodes == 51
    assert table.stats().steps_sampled == 2 * 25 * 8


def test_frames_come_back(make_table, make_episode, append_all):
    spec = make_spec(cameras=(CameraSpec(name="a", height=2, width=3), CameraSpec(name="b", height=4, width=1)))
    table = make_table(spec=spec)
    segments = make_episode("e", 10, spec=spec)
    append_all(table, segments)
    (found,) = table.episodes()
    for mine, theirs in zip(found, segments, strict=True):
        assert_same_segment(mine, theirs)


def test_counts_by_task_and_source(make_table, make_episode, append_all):
    table = make_table()
    append_all(table, make_episode("a", 10, task="open"))
    append_all(table, make_episode("b", 3, task="open", source="policy", policy_version=7))
    append_all(table, make_episode("c", 5, task="close", source="human"))
    append_all(table, make_episode("unfinished", 9, task="close", source="human")[:2])
    stats = table.stats()
    assert stats.episodes_by_task == {"open": 2, "close": 1}
    assert stats.steps_by_source == {"expert": 10, "policy": 3, "human": 5 + 8}
    assert (stats.num_steps, stats.num_episodes) == (26, 3)
    assert stats.num_bytes > 0


def test_statistics_leave_padding_out(make_table, make_episode, append_all):
    table = make_table()
    segments = make_episode("e", 10, seed=3)
    append_all(table, segments)
    statistics = table.dataset_statistics()
    proprio = np.concatenate([s.proprio[: s.length] for s in segments])
    assert statistics["proprio"].count == statistics["actions"].count == 10
    np.testing.assert_allclose(statistics["proprio"].mean, proprio.mean(axis=0), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_steps": 5}, "num_steps 5 against 4"),
        ({"capacity_steps": 2000}, "capacity_steps 2000 against 1000"),
        ({"spec": make_spec(proprio_dim=6)}, "spec "),
        ({"limiter": LimiterConfig(min_steps=2)}, "min_steps 2 against 1"),
    ],
)
def test_clients_that_disagree_are_told_how(make_table, change, field):
    table = make_table()
    with pytest.raises(ConfigError, match=f"created with another configuration.*{field}"):
        make_table(name=table.config.name, **change)


def test_readers_may_choose_their_own_context(make_table, make_episode, append_all):
    writer = make_table()
    append_all(writer, make_episode("e", 10))
    reader = make_table(name=writer.config.name, context_steps=11)
    assert reader.sample(2, timeout_s=5.0).proprio.shape == (2, 11, 5)


@pytest.mark.parametrize(
    "settings",
    [{"name": "a b"}, {"name": "{x}"}, {"num_steps": 0}, {"context_steps": 0}, {"remembered_episodes": 0}],
)
def test_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(ConfigError, match="must be"):
        TableConfig(**settings)


def test_a_full_server_makes_writers_wait_and_readers_go_on(make_server, make_table, append_all):
    running = make_server(max_memory_bytes=2**24)
    spec = make_spec(cameras=(CameraSpec(name="c", height=128, width=128),))
    # Each segment takes 1.6 MB of 16.
    table = make_table(url=running.url, spec=spec, num_steps=32, name="full")

    def segment(number):
        return make_segment(spec, episode_id=f"e{number}", num_steps=32, is_last=True, seed=number)

    def fill():
        for number in range(30):
            table.append(segment(number), timeout_s=0.2)

    with pytest.raises(ReplayWait, match=r"e\d+/0 was not stored within 0\.2 s: .*out of memory"):
        fill()
    stored = table.stats().num_episodes
    assert 2 <= stored < 12

    def limit_memory(num_bytes):
        with redis.Redis(
            unix_socket_path=str(running.directory / "server.sock"), username="admin", password=running._admin_password
        ) as admin:
            admin.config_set("maxmemory", num_bytes)

    limit_memory(2**20)
    assert table.sample(4, timeout_s=2.0).num_windows == 4
    timer = threading.Timer(0.3, limit_memory, args=(2**26,))
    timer.start()
    assert table.append(segment(stored), timeout_s=10.0) == "inserted"
    timer.join()
    assert [s[0].episode_id for s in table.episodes()] == [f"e{number}" for number in range(stored + 1)]
