"""Several tables over one buffer: each with its own sampler, limiter and most number of draws."""

import json
import threading
from collections import Counter

import numpy as np
import pytest

from vla_dist.core.errors import ConfigError, NotFound, ReplayWait
from vla_dist.replay.config import (
    BufferConfig,
    ByTask,
    Fifo,
    Prioritised,
    Recency,
    Stratified,
    TableConfig,
    Uniform,
    buffer_from_identity,
)
from vla_dist.replay.limiter import LimiterConfig
from vla_dist.replay.table import RedisReplayTable

SAMPLERS = [
    Uniform(),
    Recency(half_life_steps=50),
    Stratified(shares={"demo": 1.0}),
    ByTask(),
    Prioritised(),
]


def payloads(keys):
    return [key for key in keys if ":row:" in key]


def count_draws(table, batches, num=50):
    """How many windows ended in each segment."""
    counts = Counter()
    for _ in range(batches):
        counts.update(table.sample(num, timeout_s=5.0).items.tolist())
    return counts


def test_tables_share_what_is_stored_and_wait_by_themselves(make_table, make_client, make_episode, keys_of):
    ready = TableConfig(name="ready")
    later = TableConfig(name="later", sampler=Recency(half_life_steps=30), limiter=LimiterConfig(min_steps=25))
    table = make_table(tables=(ready, later))
    other = make_client(table, of="later")
    table.append_all(make_episode("a", 20), timeout_s=5.0)
    assert len(payloads(keys_of(table))) == 5, "stored once"
    assert table.sample(10, timeout_s=5.0).num_windows == 10
    with pytest.raises(ReplayWait, match="min_steps 25"):
        other.sample(1, timeout_s=0.1)
    other.append_all(make_episode("b", 5), timeout_s=5.0)
    assert set(other.sample(200, timeout_s=5.0).items.tolist()) == set(range(7))
    assert (table.stats().steps_sampled, other.stats().steps_sampled) == (10, 200)
    assert (table.stats().samples_waited, other.stats().samples_waited) == (0, 1)


def test_inserts_wait_for_the_slowest_table(make_table, make_client, make_episode):
    limiter = LimiterConfig(samples_per_insert=1.0, error_buffer_steps=10.0)
    table = make_table(tables=(TableConfig(name="free"), TableConfig(name="tied", limiter=limiter)))
    tied = make_client(table, of="tied")
    table.append_all(make_episode("a", 20), timeout_s=5.0)
    table.append_all(make_episode("b", 12), timeout_s=5.0)
    assert tied.limiter_state().balance == 12.0
    with pytest.raises(ReplayWait, match=r"balance 12\.0 windows, error buffer 10\.0"):
        table.append_all(make_episode("c", 1), timeout_s=0.1)
    table.sample(50, timeout_s=5.0)
    with pytest.raises(ReplayWait):
        table.append_all(make_episode("c", 1), timeout_s=0.1)
    tied.sample(2, timeout_s=5.0)
    assert table.append_all(make_episode("c", 1), timeout_s=5.0) == ["inserted"]
    assert (table.stats().inserts_waited, tied.stats().inserts_waited) == (0, 2)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: type(sampler).__name__)
def test_max_draws_removes_after_exactly_so_many(make_table, make_episode, sampler, keys_of):
    table = make_table(sampler=sampler, max_draws=3, seed=1)
    for number, length in enumerate([9, 4, 1, 20]):
        table.append_all(make_episode(f"e{number}", length, task=f"t{number % 2}"), timeout_s=5.0)
    num_rows = 3 + 1 + 1 + 5
    counts = count_draws(table, 9, num=3)
    assert max(counts.values()) <= 3
    counts += count_draws(table, 1, num=3)
    assert counts == dict.fromkeys(range(num_rows), 3)
    with pytest.raises(ReplayWait, match="0 steps of complete episodes"):
        table.sample(1, timeout_s=0.1)
    stats = table.stats()
    assert (stats.num_steps, stats.num_episodes, stats.steps_sampled) == (0, 0, 30)
    assert payloads(keys_of(table)) == [], "the memory is free"
    assert table.has_episode("e3"), "late retries are still known"
    table.append_all(make_episode("e4", 6), timeout_s=5.0)
    assert count_draws(table, 2, num=3) == {num_rows: 3, num_rows + 1: 3}


def test_max_draws_holds_over_several_readers(make_table, make_client, make_episode, keys_of):
    table = make_table(max_draws=5)
    others = [make_client(table, seed=n) for n in range(1, 4)]
    for number in range(12):
        table.append_all(make_episode(f"e{number}", 20), timeout_s=5.0)
    counts, lock = Counter(), threading.Lock()

    def read(reader):
        while True:
            try:
                items = reader.sample(7, timeout_s=0.5).items.tolist()
            except ReplayWait:
                return
            with lock:
                counts.update(items)

    threads = [threading.Thread(target=read, args=(reader,)) for reader in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # A call that cannot be filled any more gives up what it drew, so the last ones may be missing.
    assert max(counts.values()) <= 5
    assert 12 * 5 * 5 - 3 * 7 <= sum(counts.values()) <= 12 * 5 * 5
    assert payloads(keys_of(table)) == []
    assert table.limiter_state().drawable_steps == table.stats().num_steps == 0


def test_a_reader_that_comes_later_does_not_draw_what_is_used_up(make_table, make_client, make_episode):
    table = make_table(max_draws=2)
    for number in range(5):
        table.append_all(make_episode(f"e{number}", 20), timeout_s=5.0)
    counts = count_draws(table, 7, num=6)
    counts += count_draws(make_client(table, seed=9), 8, num=1)
    assert sum(counts.values()) == 50
    assert set(counts.values()) == {2}


def test_memory_is_free_when_every_table_is_done(make_table, make_client, make_episode, keys_of):
    table = make_table(tables=(TableConfig(name="once", max_draws=1), TableConfig(name="twice", max_draws=2)))
    twice = make_client(table, of="twice")
    table.append_all(make_episode("a", 4), timeout_s=5.0)
    table.append_all(make_episode("b", 4), timeout_s=5.0)
    table.sample(2, timeout_s=5.0)
    assert len(payloads(keys_of(table))) == 2, "the other table still draws from them"
    assert (table.limiter_state().drawable_steps, twice.limiter_state().drawable_steps) == (0, 8)
    assert twice.sample(4, timeout_s=5.0).num_windows == 4
    assert payloads(keys_of(table)) == []
    # And the other way round.
    table.append_all(make_episode("c", 4), timeout_s=5.0)
    twice.sample(2, timeout_s=5.0)
    assert len(payloads(keys_of(table))) == 1
    table.sample(1, timeout_s=5.0)
    assert payloads(keys_of(table)) == []
    assert table.stats().num_steps == 0


def test_a_table_without_a_limit_keeps_what_another_has_used_up(make_table, make_client, make_episode):
    table = make_table(tables=(TableConfig(name="once", max_draws=1), TableConfig(name="always")))
    table.append_all(make_episode("a", 4), timeout_s=5.0)
    table.sample(1, timeout_s=5.0)
    always = make_client(table, of="always")
    assert always.sample(30, timeout_s=5.0).num_windows == 30
    assert table.stats().num_steps == 4


def test_eviction_of_half_used_episodes_keeps_the_counters_right(make_table, make_episode, keys_of):
    table = make_table(max_draws=2, capacity_steps=45)
    for number in range(30):
        table.append_all(make_episode(f"e{number}", 20), timeout_s=5.0)
        table.sample(3, timeout_s=5.0)
    drawable = table.limiter_state().drawable_steps
    while drawable:
        table.sample(1, timeout_s=5.0)
        drawable = table.limiter_state().drawable_steps
    assert table.stats().num_steps == 0
    assert payloads(keys_of(table)) == []
    assert table.link.call([("HLEN", table.keys.of_table("used", 0))], timeout_s=5.0) == [0]


def test_names_of_what_was_used_up_do_not_pile_up(make_table, make_episode):
    table = make_table(max_draws=1)
    # One episode that nobody finishes stands in front of all that come and go.
    table.append(make_episode("abandoned", 20)[0], timeout_s=5.0)
    for number in range(40):
        table.append_all(make_episode(f"e{number}", 4), timeout_s=5.0)
        table.sample(1, timeout_s=5.0)
    assert table.stats().num_steps == 4
    (names,) = table.link.call([("LLEN", table.keys.prefix + "order")], timeout_s=5.0)
    assert names <= 2


def test_a_row_that_nobody_draws_leaves_before_its_count_is_another_s(make_table, make_episode):
    table = make_table(sampler=Recency(half_life_steps=0.2), max_draws=1, capacity_steps=45)
    table.append_all(make_episode("old", 4, instruction="old"), timeout_s=5.0)
    # Draws are all of the newest one, and more rows come and go than the capacity has steps.
    for number in range(60):
        table.append_all(make_episode(f"e{number}", 4, instruction="new"), timeout_s=5.0)
        assert table.sample(1, timeout_s=5.0).instructions == ("new",)
        assert table.stats().num_steps == (4 if number < 44 else 0)


@pytest.mark.parametrize("sampler", [*SAMPLERS, Fifo()], ids=lambda sampler: type(sampler).__name__)
def test_a_buffer_can_be_opened_by_its_name_alone(make_table, make_episode, server, sampler):
    ratio, draws = (1.0, None) if isinstance(sampler, Fifo) else (2.5, 7)
    limiter = LimiterConfig(min_steps=3, samples_per_insert=ratio, error_buffer_steps=50.0)
    config = TableConfig(name="t", sampler=sampler, limiter=limiter, max_draws=draws)
    table = make_table(tables=(TableConfig(name="first"), config), remembered_episodes=11)
    table.append_all(make_episode("e", 10), timeout_s=5.0)
    found = RedisReplayTable.open(server.url, table.config.name, context_steps=3, table="t")
    try:
        assert found.spec == table.spec
        assert found.table.kind == config.kind
        assert (found.table.limiter, found.table.max_draws) == (limiter, draws)
        assert (found.config.num_steps, found.config.capacity_steps) == (4, 1000)
        assert (found.config.context_steps, found.config.remembered_episodes) == (3, 11)
        assert [s[0].episode_id for s in found.episodes()] == ["e"]
    finally:
        found.close()


def test_names_that_do_not_exist_are_named(make_table, make_client, server):
    table = make_table(tables=(TableConfig(name="a"), TableConfig(name="b")))
    with pytest.raises(NotFound, match=r"no table 'c' in buffer .*; it has a, b"):
        make_client(table, of="c")
    with pytest.raises(NotFound, match=r"no buffer .*nothing.* in Redis at .*server\.sock"):
        RedisReplayTable.open(server.url, "nothing")


def test_an_override_of_one_table_leaves_the_others(make_table, make_client):
    table = make_table(tables=(TableConfig(name="a"), TableConfig(name="b")))
    make_client(table, of="b").override_limiter(LimiterConfig(min_steps=9))
    assert [t.limiter.config.min_steps for t in table.state().tables] == [1, 9]


def test_a_restored_table_waits_as_before_and_not_for_ever(make_server, make_table, make_client, make_episode):
    first = make_server()
    limiter = LimiterConfig(min_steps=10, samples_per_insert=2.0, error_buffer_steps=30.0)
    table = make_table(url=first.url, limiter=limiter)
    table.append_all(make_episode("e0", 20), timeout_s=5.0)
    with pytest.raises(ReplayWait):
        table.append_all(make_episode("e1", 20), timeout_s=0.1)
    before = table.limiter_state()
    first.close()
    make_server(first.directory)
    restored = make_client(table, url=first.url)
    assert restored.limiter_state() == before, "its inserts still wait, and only they"
    assert before.inserts_wait
    assert not before.samples_wait
    restored.sample(20, timeout_s=5.0)
    assert table.append_all(make_episode("e1", 20), timeout_s=5.0) == [*["duplicate"] * 4, "inserted"]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: TableConfig(name="a b"), "table name 'a b' must be 1 to 64 letters"),
        (lambda: TableConfig(name=""), "must be 1 to 64 letters"),
        (lambda: TableConfig(max_draws=0), "max_draws 0 must be at least 1, or None"),
        (lambda: TableConfig(sampler=Fifo(), max_draws=2), "a FIFO table gives each episode once"),
        (
            lambda: TableConfig(sampler=Fifo(), limiter=LimiterConfig(samples_per_insert=2.0)),
            r"samples_per_insert 2\.0 would sooner or later make one side wait for ever; use 1, or None",
        ),
        (lambda: Recency(half_life_steps=0), "half_life_steps 0 must be above 0"),
        (lambda: Recency(half_life_steps=float("nan")), "half_life_steps nan"),
        (lambda: Stratified(shares={"demos": 1.0}), r"strata \['demos'\] must be among demo, intervention"),
        (lambda: Stratified(shares={"demo": 0.0}), "not all 0"),
        (lambda: Stratified(shares={}), "not all 0"),
        (lambda: ByTask(shares={"a": -1.0}), "must be 0 or more"),
        (lambda: ByTask(shares={"a": float("inf")}), "must be 0 or more"),
        (lambda: Prioritised(alpha=1.1), r"alpha 1\.1 must be within 0\.\.1"),
        (lambda: Prioritised(beta=-0.1), r"beta -0\.1 must be within 0\.\.1"),
        (lambda: BufferConfig(name="{x}"), "buffer name '{x}' must be"),
        (lambda: BufferConfig(num_steps=0), "num_steps 0 must be at least 1"),
        (lambda: BufferConfig(context_steps=0), "context_steps 0"),
        (lambda: BufferConfig(future_steps=-1), "future_steps -1"),
        (lambda: BufferConfig(cache_bytes=-1), "cache_bytes -1"),
        (lambda: BufferConfig(capacity_steps=0), "capacity_steps 0"),
        (lambda: BufferConfig(remembered_episodes=0), "remembered_episodes 0"),
        (lambda: BufferConfig(tables=()), r"tables \[\] must be at least one"),
        (lambda: BufferConfig(tables=(TableConfig(), TableConfig())), "each with its own name"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, reason):
    with pytest.raises(ConfigError, match=reason):
        make()


def test_a_capacity_too_small_for_one_of_several_tables_is_refused(make_table):
    tables = (TableConfig(name="a"), TableConfig(name="b", limiter=LimiterConfig(min_steps=970)))
    with pytest.raises(ConfigError, match="at least 1010: min_steps 970 of table 'b'"):
        make_table(tables=tables)


def test_the_identity_brings_the_config_back(make_table):
    table = make_table(tables=(TableConfig(name="a", max_draws=3), TableConfig(name="b", sampler=Fifo())))
    identity = table.config.identity(table.spec, table.codec, images_apart=False)
    again = buffer_from_identity(table.config.name, identity)
    assert again.identity(table.spec, table.codec, images_apart=False) == identity


def test_counters_of_draws_stay_exact_when_the_ring_turns_over(make_table, make_episode):
    table = make_table(max_draws=2, capacity_steps=45, context_steps=1)
    counts = Counter()
    for number in range(80):
        table.append_all(make_episode(f"e{number}", 1 + number % 7), timeout_s=5.0)
        while table.limiter_state().drawable_steps:
            counts.update(table.sample(1, timeout_s=5.0).items.tolist())
    assert set(counts.values()) == {2}
    np.testing.assert_array_equal(sorted(counts), np.arange(sum(-(-(1 + n % 7) // 4) for n in range(80))))


def test_a_buffer_of_another_layout_is_refused_in_words(make_table):
    table = make_table()
    (stored,) = table.link.call([("HGET", table.keys.config, "identity")], timeout_s=5.0)
    older = json.dumps({**json.loads(stored), "layout": 0}, sort_keys=True)
    with pytest.raises(ConfigError, match="has layout 0, this version of vla-dist reads layout 1"):
        buffer_from_identity(table.config.name, older)
