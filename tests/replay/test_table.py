"""Appending: exactly once, all or nothing, from any thread or process."""

import multiprocessing
import threading
import time

import numpy as np
import pytest
import redis

from vla_dist.core.errors import ConfigError, DataError, ReplayWait
from vla_dist.core.specs import CameraSpec
from vla_dist.core.types import Segment
from vla_dist.replay import image_uploads
from vla_dist.replay.audit.inspection import survey
from vla_dist.replay.audit.monitoring import ReplayMonitor
from vla_dist.replay.config import BufferConfig, Prioritised, Recency, TableConfig
from vla_dist.replay.keys import episode_digest
from vla_dist.replay.limiter import LimiterConfig
from vla_dist.replay.link import ServerFull
from vla_dist.replay.table import RedisReplayTable
from vla_dist.replay.wire import Wire
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


def test_appending_again_stores_once(make_table, make_episode, append_all, keys_of):
    table = make_table()
    segments = make_episode("e", 10)
    assert append_all(table, [segments[0], *segments, *segments]) == [
        "inserted",
        *["duplicate", "inserted", "inserted"],
        *["duplicate"] * 3,
    ]
    stats = table.stats()
    assert (stats.num_steps, stats.steps_inserted, stats.duplicates, stats.num_episodes) == (10, 10, 4, 1)
    assert sum(":row:" in key for key in keys_of(table)) == 3, "nor does a duplicate's payload stay"


def test_a_lost_answer_is_asked_for_again(make_table, make_episode, append_all, monkeypatch):
    table = make_table()
    read = Wire.read
    lost = []

    def lose_first(wire, num_replies, end):
        replies = read(wire, num_replies, end)
        if not lost:
            lost.append(replies)
            raise ConnectionError("the answer was lost on its way")
        return replies

    monkeypatch.setattr(Wire, "read", lose_first)
    assert append_all(table, make_episode("e", 3)) == ["duplicate"]
    assert lost[0][-1][1][0] == b"o", "the first try was applied"
    assert (table.stats().num_steps, table.stats().steps_inserted) == (3, 3)
    assert table.stats().num_episodes == 1


def test_rows_that_nobody_committed_are_not_taken_for_those_of_a_commit(make_table, make_episode, append_all, keys_of):
    table = make_table()
    segments, others = make_episode("e", 10), make_episode("e", 10, seed=1)
    names = [table.keys.row(episode_digest("e"), index) for index in range(2)]
    # As a transaction leaves them whose commit met a server that had lost its functions.
    rows = [encoded.row for encoded in table.codec.encode_all(others[:2])]
    left = ("MSETNX", table.keys.fresh, b"a token", names[0], rows[0], names[1], rows[1])
    table.link.call([left], timeout_s=1.0)
    for _ in range(2):
        assert table.append_all(segments[1:2], timeout_s=1.0) in (["inserted"], ["duplicate"])
    assert table.append_all([segments[0], *segments[2:]], timeout_s=1.0) == ["inserted"] * 2
    (stored,) = table.episodes()
    for mine, theirs in zip(stored, segments, strict=True):
        assert_same_segment(mine, theirs)
    assert table.keys.fresh not in keys_of(table)


def test_rows_that_are_not_stored_do_not_stay(make_table, make_episode, keys_of):
    table = make_table(limiter=LimiterConfig(samples_per_insert=1.0, error_buffer_steps=0.0))
    # The second episode is the first that counts: its second segment must wait.
    with pytest.raises(ReplayWait):
        table.append_all([*make_episode("a", 8), *make_episode("b", 20)], timeout_s=0.0)
    stored = {table.keys.row(episode_digest(name), index) for name, index in (("a", 0), ("a", 1), ("b", 0))}
    assert {key for key in keys_of(table) if ":row:" in key} == stored


def test_many_segments_go_in_one_round_trip(make_table, make_episode, monkeypatch):
    table = make_table()
    exchanges = []
    read = Wire.read

    def count(wire, num_replies, end):
        exchanges.append(num_replies)
        return read(wire, num_replies, end)

    monkeypatch.setattr(Wire, "read", count)
    episodes = [make_episode(f"e{n}", length, seed=n) for n, length in enumerate([9, 20, 1, 4, 7])]
    mixed = [segment for episode in episodes for segment in episode]
    assert table.append_all(mixed, timeout_s=5.0) == ["inserted"] * len(mixed)
    assert len(exchanges) == 1
    assert table.append_all([*mixed[:3], *make_episode("f", 3)], timeout_s=5.0) == ["duplicate"] * 3 + ["inserted"]
    for found, expected in zip(table.episodes(), episodes, strict=False):
        for mine, theirs in zip(found, expected, strict=True):
            assert_same_segment(mine, theirs)
    assert table.append_all([], timeout_s=5.0) == []


def test_more_segments_than_one_commit_takes_are_all_stored(make_table, make_episode):
    table = make_table(capacity_steps=2000)
    episodes = [make_episode(f"e{n}", 20, seed=n) for n in range(40)]
    segments = [segment for episode in episodes for segment in episode]
    assert table.append_all(segments, timeout_s=5.0) == ["inserted"] * 200
    assert [s[0].episode_id for s in table.episodes()] == [f"e{n}" for n in range(40)]


def test_of_many_the_one_that_contradicts_is_named_and_the_others_are_stored(make_table, make_episode):
    table = make_table()
    table.append_all(make_episode("closed", 8), timeout_s=5.0)
    beyond = make_episode("closed", 12)[2]
    with pytest.raises(DataError, match=r"closed/2 .* contradicts index 1"):
        table.append_all([*make_episode("a", 5), beyond, *make_episode("b", 5)], timeout_s=5.0)
    assert [s[0].episode_id for s in table.episodes()] == ["closed", "a", "b"]


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


def payload_keys(keys):
    return [key for key in keys if ":row:" in key or ":image:" in key]


def test_a_writer_that_dies_before_the_commit_leaves_nothing(make_table, make_episode, append_all, keys_of):
    table = make_table(spec=make_spec(cameras=(CameraSpec(name="c", height=2, width=2),)))
    (segment,) = make_episode("e", 3, spec=table.spec)
    encoded = table.codec.encode(segment)
    digest = episode_digest("e")
    staged = ("SET", table.keys.image(digest, 0, 0), encoded.images["c"], "NX", "PX", 200)
    table.link.call([staged], timeout_s=5.0)
    assert not table.has_episode("e")
    assert table.stats().num_steps == 0
    assert list(table.episodes()) == []
    # Another writer brings the same segment while that lies there, and its payload stays.
    assert append_all(table, [segment]) == ["inserted"]
    time.sleep(0.3)
    assert_same_segment(next(table.episodes())[0], segment)
    (other,) = make_episode("other", 3, spec=table.spec)
    table.link.call([("SET", table.keys.image(episode_digest("other"), 0, 0), "x", "PX", 100)], timeout_s=5.0)
    time.sleep(0.2)
    assert len(payload_keys(keys_of(table))) == 2, "nothing of the dead writer's is left"
    assert append_all(table, [other]) == ["inserted"]


def test_stored_payloads_never_expire(make_table, make_episode, append_all, server, keys_of):
    table = make_table(spec=make_spec(cameras=(CameraSpec(name="c", height=2, width=2),)))
    append_all(table, make_episode("e", 10, spec=table.spec))
    keys = keys_of(table)
    assert len(payload_keys(keys)) == 2 * 3
    with redis.Redis.from_url(server.url) as client:
        assert [client.pttl(key) for key in keys] == [-1] * len(keys)


def test_images_that_expired_before_their_commit_are_sent_again(make_table, make_episode, monkeypatch):
    spec = make_spec(cameras=(CameraSpec(name="c", height=2, width=2),))
    table = make_table(spec=spec, limiter=LimiterConfig(samples_per_insert=1.0, error_buffer_steps=0.0))
    monkeypatch.setattr(image_uploads, "_STAGE_MS", b"50")
    table.append_all(make_episode("first", 20, spec=spec), timeout_s=5.0)
    table.append_all(make_episode("second", 4, spec=spec), timeout_s=5.0)
    # The third waits for the limiter longer than its images live.
    reader = threading.Timer(0.3, table.sample, args=(8,), kwargs={"timeout_s": 5.0})
    reader.start()
    third = make_episode("third", 4, spec=spec)
    assert table.append_all(third, timeout_s=10.0) == ["inserted"]
    reader.join()
    *_, (found,) = table.episodes()
    assert_same_segment(found, third[0])


def test_who_waits_asks_without_its_rows(make_table, make_episode, monkeypatch):
    table = make_table(limiter=LimiterConfig(samples_per_insert=1.0, error_buffer_steps=0.0))
    table.append_all(make_episode("first", 20), timeout_s=5.0)
    table.append_all(make_episode("second", 4), timeout_s=5.0)
    sent, send = [], Wire.send

    def count(wire, buffers, end):
        sent.append(sum(memoryview(buffer).nbytes for buffer in buffers))
        return send(wire, buffers, end)

    monkeypatch.setattr(Wire, "send", count)
    with pytest.raises(ReplayWait, match=r"within 0\.5 s: the limiter makes inserts wait"):
        table.append_all(make_episode("third", 4), timeout_s=0.5)
    assert len(sent) > 3
    assert max(sent[1:]) < table.codec.row_bytes < sent[0]
    assert table.limiter_state().balance == pytest.approx(4.0)
    table.override_limiter(LimiterConfig())
    assert table.append_all(make_episode("third", 4), timeout_s=0.5) == ["inserted"]


def write_episodes(url, name, writer, num_episodes):
    spec = make_spec(max_episode_steps=20)
    table = RedisReplayTable(url, spec, BufferConfig(name=name, num_steps=4, context_steps=6, capacity_steps=1000))
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
    assert stats.steps_by_source == {"expert": 10, "policy": 3, "human": 5}, "of complete episodes"
    assert (stats.num_steps, stats.num_episodes) == (26, 3)
    assert stats.num_bytes > 0


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_steps": 5}, "num_steps 5 against 4"),
        ({"capacity_steps": 2000}, "capacity_steps 2000 against 1000"),
        ({"spec": make_spec(proprio_dim=6)}, "spec "),
        ({"limiter": LimiterConfig(min_steps=2)}, "table default: min_steps 2 against 1"),
        ({"max_draws": 3}, "table default: max_draws 3 against None"),
        ({"sampler": Prioritised()}, "table default: kind 'prioritised' against 'uniform'"),
        ({"tables": (TableConfig(), TableConfig(name="b"))}, r"tables \['default', 'b'\] against \['default'\]"),
        ({"remembered_episodes": 5}, "remembered_episodes 5 against 100000"),
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


def test_a_reader_may_choose_the_numbers_of_its_sampler(make_table, make_client):
    table = make_table(sampler=Recency(half_life_steps=10))
    make_client(table, tables=(TableConfig(sampler=Recency(half_life_steps=99)),))


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

    with pytest.raises(ReplayWait, match=r"1 segments from e\d+/0 on were not stored within 0\.2 s: .*out of memory"):
        fill()
    stored = table.stats().num_episodes
    assert 2 <= stored < 12
    assert survey(table).memory_refusals > 0
    assert ReplayMonitor(table).look().memory_refusals > 0

    def limit_memory(num_bytes):
        with redis.Redis(
            unix_socket_path=str(running.directory / "server.sock"), username="admin", password=running._admin_password
        ) as admin:
            admin.config_set("maxmemory", num_bytes)

    limit_memory(2**20)
    with pytest.raises(ServerFull, match="out of memory; raise its limit or lower capacity_steps"):
        table.link.call([("SET", "k", "v")], timeout_s=5.0)
    assert table.sample(4, timeout_s=2.0).num_windows == 4
    timer = threading.Timer(0.3, limit_memory, args=(2**26,))
    timer.start()
    assert table.append(segment(stored), timeout_s=10.0) == "inserted"
    timer.join()
    assert [s[0].episode_id for s in table.episodes()] == [f"e{number}" for number in range(stored + 1)]
