"""FIFO tables: each whole episode to exactly one consumer of the group."""

import threading
import time

import pytest

from vla_dist.core.errors import ConfigError, ReplayWait
from vla_dist.core.specs import CameraSpec
from vla_dist.replay.config import Fifo, TableConfig
from vla_dist.replay.limiter import LimiterConfig
from vla_dist.replay.queue import EpisodeQueue
from vla_dist.testing.fakes import make_spec

TIED = LimiterConfig(samples_per_insert=1.0, error_buffer_steps=60.0)


@pytest.fixture
def make_queue_table(make_table):
    def make(**settings):
        return make_table(**{"sampler": Fifo(), **settings})

    return make


def fill(table, make_episode, names, *, length=10):
    for name in names:
        table.append_all(make_episode(name, length), timeout_s=5.0)


def names_of(taken):
    return [episode.segments[0].episode_id for episode in taken]


def test_episodes_come_whole_and_in_the_order_they_became_so(make_queue_table, make_episode):
    spec = make_spec(cameras=(CameraSpec(name="c", height=2, width=2),))
    table = make_queue_table(spec=spec)
    first, second = make_episode("first", 10, spec=spec), make_episode("second", 3, spec=spec, seed=4)
    table.append_all(first[:2], timeout_s=5.0)
    table.append_all([*second, first[2]], timeout_s=5.0)
    queue = EpisodeQueue(table, "me")
    taken = queue.take(5, timeout_s=5.0)
    assert names_of(taken) == ["second", "first"]
    assert [episode.completion for episode in taken] == [1, 2]
    assert [segment.segment_index for segment in taken[1].segments] == [0, 1, 2]
    for mine, theirs in zip(taken[1].segments, first, strict=True):
        assert (mine.actions[: mine.length] == theirs.actions[: theirs.length]).all()
        assert (mine.images["c"][: mine.length] == theirs.images["c"][: theirs.length]).all()


def test_no_more_than_asked_for(make_queue_table, make_episode):
    table = make_queue_table()
    fill(table, make_episode, "abcde")
    queue = EpisodeQueue(table, "me")
    assert [names_of(queue.take(2, timeout_s=5.0)) for _ in range(3)] == [["a", "b"], ["c", "d"], ["e"]]
    with pytest.raises(ReplayWait, match=r"no whole episode for consumer 'me' of 'default' within 0\.1 s, 5 are not"):
        queue.take(1, timeout_s=0.1)


def test_a_consumer_waits_for_the_next_episode(make_queue_table, make_client, make_episode):
    table = make_queue_table()
    queue = EpisodeQueue(table, "me")
    writer = threading.Timer(0.3, fill, args=(make_client(table), make_episode, ["late"]))
    writer.start()
    start = time.monotonic()
    assert names_of(queue.take(3, timeout_s=10.0)) == ["late"]
    assert 0.2 < time.monotonic() - start < 5.0
    writer.join()


def test_each_episode_goes_to_exactly_one_of_many_consumers(make_queue_table, make_client, make_episode):
    table = make_queue_table(capacity_steps=2000)
    seen, lock = [], threading.Lock()

    def consume(number):
        queue = EpisodeQueue(make_client(table), f"consumer-{number}")
        while True:
            try:
                taken = queue.take(3, timeout_s=1.0)
            except ReplayWait:
                return
            assert queue.acknowledge(taken) == len(taken)
            with lock:
                seen.extend(names_of(taken))

    consumers = [threading.Thread(target=consume, args=(number,)) for number in range(4)]
    for consumer in consumers:
        consumer.start()
    fill(table, make_episode, [f"e{n}" for n in range(80)])
    for consumer in consumers:
        consumer.join()
    assert sorted(seen) == sorted(f"e{n}" for n in range(80))
    assert EpisodeQueue(table, "x").lost_episodes == 0


def test_what_is_acknowledged_is_removed(make_queue_table, make_episode, keys_of):
    table = make_queue_table()
    fill(table, make_episode, "abc")
    queue = EpisodeQueue(table, "me")
    taken = queue.take(2, timeout_s=5.0)
    assert table.stats().num_steps == 30, "taken is not yet dealt with"
    assert queue.acknowledge(taken[:1]) == 1
    assert (table.stats().num_steps, table.stats().steps_sampled) == (20, 10)
    assert queue.acknowledge(taken) == 1, "the first one is known already"
    assert queue.acknowledge(taken) == 0
    assert queue.acknowledge([]) == 0
    assert sum(":row:" in key for key in keys_of(table)) == 3
    assert (table.limiter_state().drawable_steps, queue.lost_episodes) == (10, 0)
    assert table.has_episode("a")
    assert table.append(make_episode("a", 10)[0], timeout_s=5.0) == "duplicate"
    assert names_of(queue.take(5, timeout_s=5.0)) == ["c"]
    with pytest.raises(ReplayWait, match="1 are not acknowledged yet"):
        queue.take(1, timeout_s=0.0)


def test_what_other_tables_draw_from_stays(make_table, make_client, make_episode):
    table = make_table(tables=(TableConfig(name="windows"), TableConfig(name="queue", sampler=Fifo())))
    queue = EpisodeQueue(make_client(table, of="queue"), "me")
    fill(table, make_episode, "ab")
    assert queue.acknowledge(queue.take(2, timeout_s=5.0)) == 2
    assert table.stats().num_steps == 20
    assert table.sample(50, timeout_s=5.0).num_windows == 50
    with pytest.raises(ReplayWait):
        queue.take(1, timeout_s=0.1)


def test_two_queues_each_get_all(make_table, make_client, make_episode, keys_of):
    table = make_table(tables=(TableConfig(name="one", sampler=Fifo()), TableConfig(name="two", sampler=Fifo())))
    one, two = EpisodeQueue(table, "me"), EpisodeQueue(make_client(table, of="two"), "me")
    fill(table, make_episode, "ab")
    first = one.take(5, timeout_s=5.0)
    assert names_of(first) == ["a", "b"]
    one.acknowledge(first)
    second = two.take(5, timeout_s=5.0)
    assert names_of(second) == ["a", "b"]
    two.acknowledge(second[1:])
    assert table.stats().num_steps == 10
    two.acknowledge(second[:1])
    assert not any(":row:" in key for key in keys_of(table))


def test_a_consumer_that_comes_back_gets_what_it_had(make_queue_table, make_client, make_episode):
    table = make_queue_table()
    fill(table, make_episode, "abc")
    before = EpisodeQueue(table, "me")
    assert names_of(before.take(2, timeout_s=5.0)) == ["a", "b"]
    again = EpisodeQueue(make_client(table), "me")
    assert names_of(again.take(1, timeout_s=5.0)) == ["a"]
    taken = again.take(5, timeout_s=5.0)
    assert names_of(taken) == ["b", "c"], "what it had, and then what nobody had"
    assert again.acknowledge(taken) == 2


def test_a_lost_consumer_s_episodes_go_to_another(make_queue_table, make_client, make_episode):
    table = make_queue_table()
    fill(table, make_episode, "abcd")
    lost = EpisodeQueue(table, "lost")
    had = lost.take(3, timeout_s=5.0)
    heir = EpisodeQueue(make_client(table), "heir", abandoned_after_s=0.4)
    assert names_of(heir.take(4, timeout_s=5.0)) == ["d"], "the others are not given up yet"
    time.sleep(0.5)
    taken = heir.take(4, timeout_s=5.0)
    assert names_of(taken) == ["a", "b", "c"]
    assert heir.acknowledge(taken) == 3
    assert lost.acknowledge(had) == 0, "it was not lost after all, but late"
    assert table.stats().steps_sampled == 30, "counted once"


def test_a_consumer_may_give_up_its_own_at_once(make_queue_table, make_episode):
    # Everything it has counts as abandoned each time it asks, and still it gets each episode once.
    table = make_queue_table()
    fill(table, make_episode, "abc")
    queue = EpisodeQueue(table, "me", abandoned_after_s=1e-6)
    assert [names_of(queue.take(1, timeout_s=5.0)) for _ in range(3)] == [["a"], ["b"], ["c"]]
    with pytest.raises(ReplayWait):
        queue.take(1, timeout_s=0.1)


def test_eviction_of_what_nobody_acknowledged_is_counted(make_queue_table, make_episode):
    table = make_queue_table(capacity_steps=45)
    queue = EpisodeQueue(table, "me")
    fill(table, make_episode, "abcd")
    taken = queue.take(2, timeout_s=5.0)
    # c and d were never taken, a is acknowledged before it could be evicted.
    queue.acknowledge(taken[:1])
    fill(table, make_episode, ["e", "f", "g", "h"])
    assert [s[0].episode_id for s in table.episodes()] == ["e", "f", "g", "h"]
    assert queue.lost_episodes == 3
    assert names_of(queue.take(9, timeout_s=5.0)) == ["e", "f", "g", "h"]
    assert queue.acknowledge(taken) in (0, 1), "b is gone"
    assert EpisodeQueue(table, "other").lost_episodes == 3, "counted for the group"


def test_a_discarded_episode_is_passed_over(make_queue_table, make_episode):
    table = make_queue_table()
    fill(table, make_episode, "abc")
    queue = EpisodeQueue(table, "me")
    assert names_of(queue.take(1, timeout_s=5.0)) == ["a"]
    table.discard(2)
    assert names_of(queue.take(5, timeout_s=5.0)) == ["c"]
    assert queue.lost_episodes == 1


def test_a_limiter_of_one_sample_an_insert_loses_nothing(make_queue_table, make_client, make_episode):
    table = make_queue_table(capacity_steps=100, limiter=TIED)
    queue = EpisodeQueue(table, "me")
    writer = make_client(table)
    # A consumer that keeps up for long must not be taken as a promise that it goes on.
    for number in range(40):
        fill(writer, make_episode, [f"quick-{number}"])
        queue.acknowledge(queue.take(1, timeout_s=5.0))

    def append_until_told_to_wait():
        for number in range(40):
            writer.append_all(make_episode(f"slow-{number}", 10), timeout_s=0.1)

    with pytest.raises(ReplayWait, match=r"the limiter makes inserts wait.*error buffer 60\.0"):
        append_until_told_to_wait()
    stored = table.stats().num_episodes
    assert 5 <= stored <= 7
    assert queue.lost_episodes == 0
    taken = queue.take(40, timeout_s=5.0)
    assert names_of(taken) == [f"slow-{number}" for number in range(stored)]
    queue.acknowledge(taken)
    fill(writer, make_episode, [f"slow-{stored}", "last"])
    assert names_of(queue.take(9, timeout_s=5.0)) == [f"slow-{stored}", "last"]


def test_abandoned_open_episodes_do_not_make_writers_wait_for_ever(make_queue_table, make_episode):
    table = make_queue_table(capacity_steps=100, limiter=TIED)
    queue = EpisodeQueue(table, "me")
    for number in range(30):
        # A writer that dies in the middle leaves 8 steps behind that nobody can take.
        table.append_all(make_episode(f"broken-{number}", 20)[:2], timeout_s=5.0)
        fill(table, make_episode, [f"whole-{number}"])
        taken = queue.take(5, timeout_s=5.0)
        assert names_of(taken) == [f"whole-{number}"]
        queue.acknowledge(taken)


def test_other_tables_and_numbers_are_refused(make_table, make_queue_table):
    with pytest.raises(ConfigError, match="table 'default' is uniform, expected a FIFO table"):
        EpisodeQueue(make_table(), "me")
    table = make_queue_table()
    with pytest.raises(ConfigError, match="abandoned_after_s 0"):
        EpisodeQueue(table, "me", abandoned_after_s=0)
    for num in (0, 257):
        with pytest.raises(ConfigError, match=rf"num_episodes {num} must be within 1\.\.256"):
            EpisodeQueue(table, "me").take(num, timeout_s=1.0)
    with pytest.raises(ConfigError, match="read it with EpisodeQueue"):
        table.sample(1, timeout_s=1.0)


def test_queues_outlive_a_restart(make_server, make_queue_table, make_client, make_episode):
    first = make_server()
    table = make_queue_table(url=first.url)
    fill(table, make_episode, "abcd")
    queue = EpisodeQueue(table, "me")
    had = queue.take(2, timeout_s=5.0)
    queue.acknowledge(had[:1])
    first.close()
    make_server(first.directory)
    assert names_of(queue.take(1, timeout_s=5.0)) == ["c"]
    assert queue.acknowledge(had) == 1
    again = EpisodeQueue(make_client(table, url=first.url), "me")
    assert names_of(again.take(5, timeout_s=5.0)) == ["c", "d"]
