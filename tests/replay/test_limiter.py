import math
import threading
import time

import pytest

from vla_dist.core.errors import ConfigError, ReplayWait
from vla_dist.replay.config import BufferConfig, TableConfig
from vla_dist.replay.limiter import LimiterConfig, LimiterState
from vla_dist.replay.link import RedisLink
from vla_dist.replay.shards import ShardedReplayTable
from vla_dist.testing.fakes import make_spec


def balanced(**changes):
    """Two windows for each inserted step, within 30 of each other."""
    return LimiterConfig(**{"min_steps": 10, "samples_per_insert": 2.0, "error_buffer_steps": 30.0, **changes})


@pytest.fixture
def waiting_writer(make_table, make_episode, append_all):
    """A table whose inserts wait: after 20 steps, which do not count, 16 were inserted: the balance is 32."""
    table = make_table(limiter=balanced())
    append_all(table, make_episode("first", 20))
    append_all(table, make_episode("second", 16))
    return table


def test_nothing_is_drawn_before_min_steps(make_table, make_episode, append_all):
    table = make_table(limiter=LimiterConfig(min_steps=21))
    append_all(table, make_episode("a", 20))
    append_all(table, make_episode("open", 20)[:4])
    assert table.limiter_state().samples_wait
    start = time.monotonic()
    with pytest.raises(ReplayWait, match=r"20 steps of complete episodes stored, min_steps 21; 36 steps in all"):
        table.sample(4, timeout_s=0.2)
    assert 0.2 <= time.monotonic() - start < 1.5
    append_all(table, make_episode("b", 1))
    assert table.sample(4, timeout_s=1.0).num_windows == 4
    stats = table.stats()
    assert (stats.samples_waited, stats.steps_sampled) == (1, 4), "counted once a call, not once a try"


def test_what_follows_a_segment_that_waits_waits_behind_it(waiting_writer, make_episode, append_all):
    table = waiting_writer
    stored = make_episode("second", 16)
    late = [segment for number in range(8) for segment in make_episode(f"late-{number}", 20)]
    with pytest.raises(ReplayWait, match=r"late-0/0 on were not stored"):
        # More than one commit: the next must neither count the wait once more nor see the duplicates behind it.
        table.append_all([*stored, *late[:20], *(stored * 5), *late[20:]], timeout_s=0.0)
    assert table.stats().inserts_waited == 1
    assert table.stats().duplicates == len(stored)


def test_inserts_wait_until_enough_is_sampled(waiting_writer, make_episode, append_all):
    table = waiting_writer
    (segment,) = make_episode("third", 4)
    assert table.limiter_state().balance == 32.0
    start = time.monotonic()
    with pytest.raises(
        ReplayWait,
        match=r"third/0 on were not stored within 0\.2 s: .*balance 32\.0 windows, error buffer 30\.0",
    ):
        table.append(segment, timeout_s=0.2)
    assert 0.2 <= time.monotonic() - start < 1.5
    assert not table.has_episode("third")
    assert table.stats().inserts_waited == 1
    table.sample(10, timeout_s=1.0)
    assert table.append(segment, timeout_s=1.0) == "inserted"
    assert table.limiter_state().balance == 30.0
    assert append_all(table, make_episode("fourth", 4)) == ["inserted"], "the buffer may be filled to its brim"


def test_a_waiting_insert_goes_on_when_a_reader_comes(waiting_writer, make_episode):
    reader = threading.Timer(0.3, waiting_writer.sample, args=(20,), kwargs={"timeout_s": 5.0})
    reader.start()
    start = time.monotonic()
    assert waiting_writer.append(make_episode("third", 4)[0], timeout_s=5.0) == "inserted"
    assert 0.2 < time.monotonic() - start < 3.0
    reader.join()


def test_a_duplicate_need_not_wait(waiting_writer, make_episode, append_all):
    assert append_all(waiting_writer, make_episode("first", 20)[:1]) == ["duplicate"]


def test_samples_wait_until_enough_is_inserted(make_table, make_episode, append_all):
    table = make_table(limiter=balanced())
    append_all(table, make_episode("first", 20))
    table.sample(31, timeout_s=1.0)
    state = table.limiter_state()
    assert (state.balance, state.drawable_steps, state.samples_wait, state.inserts_wait) == (-31.0, 20, True, False)
    with pytest.raises(ReplayWait, match=r"samples wait.*balance -31\.0 windows, error buffer 30\.0"):
        table.sample(1, timeout_s=0.1)
    append_all(table, make_episode("second", 4))
    assert table.sample(1, timeout_s=1.0).num_windows == 1


def test_the_ratio_holds_in_the_long_run(make_table, make_episode, append_all):
    limiter = balanced(error_buffer_steps=40.0)
    table = make_table(limiter=limiter)
    reader = make_table(name=table.config.name, limiter=limiter)
    append_all(table, make_episode("first", 10))
    stop = threading.Event()

    def read():
        while not stop.is_set():
            try:
                reader.sample(8, timeout_s=0.05)
            except ReplayWait:
                continue

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for number in range(40):
            append_all(table, make_episode(f"e{number}", 20))
    finally:
        stop.set()
        thread.join()
    stats = table.stats()
    assert abs(stats.steps_sampled - 2.0 * (stats.steps_inserted - 10)) <= 40 + 8 + 2 * 4


def test_without_a_ratio_nobody_waits(make_table, make_episode, append_all):
    table = make_table(limiter=LimiterConfig(error_buffer_steps=0.0))
    append_all(table, make_episode("first", 20))
    for _ in range(3):
        table.sample(500, timeout_s=0.5)
    append_all(table, make_episode("second", 20))
    assert table.stats().inserts_waited == table.stats().samples_waited == 0


def test_an_override_releases_those_who_wait(waiting_writer, make_episode):
    table = waiting_writer
    release = threading.Timer(0.2, table.override_limiter, args=(LimiterConfig(),))
    release.start()
    assert table.append(make_episode("third", 4)[0], timeout_s=5.0) == "inserted"
    release.join()
    state = table.limiter_state()
    assert (state.config.samples_per_insert, state.config.min_steps, state.balance) == (None, 1, 0.0)


def test_an_override_holds_for_all_and_changes_no_identity(waiting_writer, make_table, make_episode):
    table = waiting_writer
    table.override_limiter(balanced(samples_per_insert=0.5, error_buffer_steps=5.0))
    later = make_table(name=table.config.name, limiter=balanced())
    assert later.limiter_state().config == balanced(samples_per_insert=0.5, error_buffer_steps=5.0)
    later.sample(6, timeout_s=1.0)
    with pytest.raises(ReplayWait, match=r"samples_per_insert 0\.5"):
        later.sample(1, timeout_s=0.1)


def test_an_override_that_could_never_sample_is_refused(waiting_writer):
    with pytest.raises(ConfigError, match="capacity_steps 1000 must be at least 1030"):
        waiting_writer.override_limiter(LimiterConfig(min_steps=990))
    assert waiting_writer.limiter_state().config == balanced()


def test_eviction_below_min_steps_stops_nobody_for_ever(make_table, make_episode, append_all):
    table = make_table(capacity_steps=60, limiter=balanced(min_steps=20, error_buffer_steps=0.0))
    append_all(table, make_episode("a", 20))
    # An open episode takes its share and the limiter is full on the insert side.
    for number in range(6):
        segments = make_episode(f"e{number}", 20)
        for segment in segments:
            while True:
                try:
                    table.append(segment, timeout_s=0.0)
                    break
                except ReplayWait:
                    table.sample(4, timeout_s=1.0)
    assert table.stats().steps_inserted == 140


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"min_steps": 0}, "nothing to sample"),
        ({"samples_per_insert": 0.0}, "wait for ever"),
        ({"samples_per_insert": -1.0}, "wait for ever"),
        ({"samples_per_insert": math.inf}, "positive number"),
        ({"samples_per_insert": math.nan}, "positive number"),
        ({"error_buffer_steps": -1.0}, "both wait, for ever"),
        ({"error_buffer_steps": math.inf}, "must be 0 or more"),
    ],
)
def test_settings_that_deadlock_are_refused_with_the_reason(settings, reason):
    with pytest.raises(ConfigError, match=reason):
        LimiterConfig(**settings)


def test_a_capacity_that_could_never_reach_min_steps_is_refused(make_table):
    spec = make_spec(max_episode_steps=20)
    table = TableConfig(limiter=LimiterConfig(min_steps=100))
    BufferConfig(capacity_steps=140, tables=(table,)).require_capacity(spec)
    with pytest.raises(ConfigError, match=r"capacity_steps 139 must be at least 140.*might wait for ever"):
        make_table(capacity_steps=139, limiter=LimiterConfig(min_steps=100))


@pytest.mark.parametrize("drawable", [0, 9, 10, 500])
@pytest.mark.parametrize("balance", [-1e9, -30.0, 0.0, 30.0, 1e9])
@pytest.mark.parametrize("buffer", [0.0, 30.0])
@pytest.mark.parametrize("ratio", [None, 0.1, 8.0])
def test_both_sides_never_wait_at_once(drawable, balance, buffer, ratio):
    state = LimiterState(
        config=LimiterConfig(min_steps=10, samples_per_insert=ratio, error_buffer_steps=buffer),
        drawable_steps=drawable,
        balance=balance,
    )
    assert not (state.inserts_wait and state.samples_wait)


@pytest.fixture
def lose_charges(monkeypatch):
    """Answers to a charge get lost, the first time, after the server has done what was asked."""
    lost = []
    exchange = RedisLink.exchange

    def lose(link, commands, *, timeout_s):
        replies = exchange(link, commands, timeout_s=timeout_s)
        if not lost and any(str(command[1]).startswith("vla_charge") for command in commands if len(command) > 1):
            lost.append(replies)
            return exchange(link, commands, timeout_s=timeout_s)
        return replies

    monkeypatch.setattr(RedisLink, "exchange", lose)
    return lost


def test_a_charge_whose_answer_was_lost_counts_once(waiting_writer, lose_charges):
    table = waiting_writer
    table.sample(10, timeout_s=1.0)
    assert lose_charges
    assert table.limiter_state().balance == 22.0
    assert table.stats().steps_sampled == 10
    table.sample(10, timeout_s=1.0)
    assert table.limiter_state().balance == 12.0, "the next one counts"


def test_a_charge_to_shards_whose_answer_was_lost_counts_once(make_server, make_episode, lose_charges):
    servers = [make_server(), make_server()]
    limiter = balanced(min_steps=1, error_buffer_steps=1000.0)
    config = BufferConfig(
        name="b", num_steps=4, context_steps=4, capacity_steps=400, tables=(TableConfig(limiter=limiter),)
    )
    table = ShardedReplayTable([server.url for server in servers], make_spec(max_episode_steps=20), config)
    try:
        for number in range(8):
            table.append_all(make_episode(f"e{number}", 20), timeout_s=5.0)
        before = table.limiter_state().balance
        table.sample(32, timeout_s=5.0)
        assert lose_charges
        assert table.limiter_state().balance == pytest.approx(before - 32)
        assert table.stats().steps_sampled == 32
    finally:
        table.close()
