"""One buffer over several servers behaves as one on a single server."""

import itertools
import os
import signal
import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from vla_dist.core.errors import ConfigError, NotFound, ReplayWait, Unreachable
from vla_dist.core.specs import CameraSpec
from vla_dist.replay.config import BufferConfig, ByTask, Fifo, Prioritised, Recency, Stratified, TableConfig
from vla_dist.replay.limiter import LimiterConfig
from vla_dist.replay.queue import EpisodeQueue
from vla_dist.replay.server import EmbeddedServer
from vla_dist.replay.shards import ShardedReplayTable, refuse_shards, shard_of
from vla_dist.replay.table import RedisReplayTable
from vla_dist.testing.fakes import make_spec

SPEC = make_spec(max_episode_steps=20)
T = 4
_names = (f"sharded-{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Three that no test kills."""
    running = [EmbeddedServer(tmp_path_factory.mktemp(f"shard-{n}")) for n in range(3)]
    yield running
    for server in running:
        server.close()


@pytest.fixture
def make_sharded(servers):
    opened = []

    def make(*, urls=None, seed=0, name=None, table=None, spec=SPEC, images_urls=None, **settings):
        mine = {key: settings.pop(key) for key in ("sampler", "limiter", "max_draws") if key in settings}
        defaults = {"num_steps": T, "context_steps": 6, "capacity_steps": 3000, "tables": (TableConfig(**mine),)}
        config = BufferConfig(name=name or next(_names), **{**defaults, **settings})
        urls = urls or [server.url for server in servers]
        opened.append(ShardedReplayTable(urls, spec, config, table=table, seed=seed, images_urls=images_urls))
        return opened[-1]

    yield make
    for table in opened:
        table.close()


def fill(table, make_episode, lengths, **options):
    for number, length in enumerate(lengths):
        table.append_all(make_episode(f"e{number}", length, seed=number, **options), timeout_s=5.0)


def steps_of(batch):
    """(episode's first proprio, step) of each window's last step would not be unique; items and steps are."""
    return list(zip(batch.items.tolist(), (batch.timesteps[:, -1]).tolist(), strict=True))


def test_episodes_lie_whole_on_one_server_each_and_come_back_in_order(make_sharded, make_episode):
    table = make_sharded()
    fill(table, make_episode, [9, 4, 1, 20, 7, 7])
    assert [segments[0].episode_id for segments in table.episodes()] == [f"e{n}" for n in range(6)]
    assert len(list(table.episodes(limit=4))) == 4
    for number, shard in enumerate(table.shards):
        for segments in shard.episodes():
            assert shard_of(segments[0].episode_id, 3) == number
    assert sorted(Counter(shard_of(f"e{n}", 3) for n in range(6))) == [0, 1, 2]
    assert table.has_episode("e3")
    assert not table.has_episode("e6")
    state, counters = table.state(), table.stats()
    assert (state.steps, state.complete, counters.num_steps, counters.num_episodes) == (48, 6, 48, 6)
    assert counters.steps_by_source == {"expert": 48}
    assert counters.episodes_by_task == {"go": 6}


def test_where_an_episode_lies_never_changes():
    assert [shard_of(f"run-7/worker-1/{n}", 3) for n in range(8)] == [2, 0, 1, 0, 0, 2, 0, 1]


def test_appending_again_stores_once(make_sharded, make_episode):
    table = make_sharded()
    segments = [segment for n in range(5) for segment in make_episode(f"e{n}", 9)]
    assert table.append_all(segments, timeout_s=5.0) == ["inserted"] * 15
    assert table.append_all(segments[::-1], timeout_s=5.0) == ["duplicate"] * 15
    assert table.append(segments[0], timeout_s=5.0) == "duplicate"
    assert table.state().duplicates == 16


def test_uniform_stays_uniform_over_all_steps(make_sharded, make_episode):
    """Chi-square over every single step; shards hold very different numbers of them."""
    table = make_sharded(seed=5)
    lengths = [20] * 9 + [1] * 7 + [3, 6]
    fill(table, make_episode, lengths)
    total, batches = sum(lengths), 60
    held = [shard.state().steps for shard in table.shards]
    assert max(held) > 1.3 * min(held)
    seen = Counter(step for _ in range(batches) for step in steps_of(table.sample(100, timeout_s=5.0)))
    counts = np.array(list(seen.values()))
    assert len(counts) == total
    assert stats.chisquare(counts).pvalue > 1e-3
    by_shard = Counter(item % 3 for item, _ in seen.elements())
    assert stats.chisquare([by_shard[n] for n in range(3)], np.array(held) / total * 6000).pvalue > 1e-3


def test_windows_are_the_steps_of_their_episodes(make_sharded, make_episode):
    spec = make_spec(cameras=(CameraSpec(name="c", height=3, width=2),))
    table = make_sharded(spec=spec)
    fill(table, make_episode, [9, 13, 5, 20], spec=spec)
    episodes = {len_: segments for segments in table.episodes() for len_ in [sum(s.length for s in segments)]}
    batch = table.sample(64, timeout_s=5.0)
    assert batch.num_windows == 64
    assert set(batch.episode_lengths.tolist()) == {9, 13, 5, 20}
    for window in range(64):
        mask, steps = batch.padding_mask[window], batch.timesteps[window]
        segments = episodes[int(batch.episode_lengths[window])]
        for mine, name in ((batch.proprio, "proprio"), (batch.actions, "actions")):
            whole = np.concatenate([getattr(segment, name)[: segment.length] for segment in segments])
            np.testing.assert_array_equal(mine[window][mask], whole[steps[mask]])
        frames = np.concatenate([segment.images["c"][: segment.length] for segment in segments])
        np.testing.assert_array_equal(batch.images["c"][window][mask], frames[steps[mask]])
    assert batch.ages_s.shape == (64,)
    assert len(batch.tasks) == 64


def test_priorities_and_weights_are_those_of_the_whole(make_sharded, make_episode):
    sampler = Prioritised(alpha=1.0, beta=1.0)
    table = make_sharded(sampler=sampler, seed=3)
    lengths = [4, 4, 4, 4, 4, 2, 3, 1]
    fill(table, make_episode, lengths)
    batch = table.sample(400, timeout_s=5.0)
    np.testing.assert_allclose(batch.weights, 1.0, rtol=1e-5)
    items = np.unique(batch.items)
    assert len(items) == 8
    scores = dict(zip(items.tolist(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], strict=True))
    table.update_priorities(items, np.array(list(scores.values())))
    length_of = dict(zip(batch.items.tolist(), batch.episode_lengths.tolist(), strict=True))
    mass = {item: score * length_of[item] for item, score in scores.items()}
    seen: Counter[int] = Counter()
    for _ in range(40):
        batch = table.sample(100, timeout_s=5.0)
        seen.update(batch.items.tolist())
        # beta 1: the weight is inverse to the probability of a step, so to its priority, over the largest of the batch.
        raw = np.array([1 / scores[item] for item in batch.items.tolist()])
        np.testing.assert_allclose(batch.weights, raw / raw.max(), rtol=1e-4)
    expected = np.array([mass[item] for item in items.tolist()])
    observed = np.array([seen[item] for item in items.tolist()])
    assert stats.chisquare(observed, expected / expected.sum() * 4000).pvalue > 1e-3


def test_a_new_segment_has_the_highest_priority_of_any_shard(make_sharded, make_episode):
    table = make_sharded(sampler=Prioritised())
    fill(table, make_episode, [4, 4, 4, 4])
    first = table.sample(1, timeout_s=5.0)
    table.update_priorities(first.items, np.array([50.0]))
    assert [shard.state().tables[0].max_priority for shard in table.shards] == [50.0] * 3
    other = make_sharded(name=table.config.name, sampler=Prioritised())
    for client in (table, other):
        number = 100 if client is table else 200
        new = [f"e{n}" for n in range(number, number + 3)]
        client.append_all([s for name in new for s in make_episode(name, 4)], timeout_s=5.0)
        client.sample(1, timeout_s=5.0)
        trees = [shard.windows._follower.sampler._tree for shard in client.shards]
        assert sum(tree.total for tree in trees) > (len(new) * 4 * 50**0.6)


def test_recency_is_that_of_the_whole(make_sharded, make_episode):
    table = make_sharded(sampler=Recency(half_life_steps=60), seed=2)
    fill(table, make_episode, [4] * 90)
    newest = {n: 90 - n for n in range(90)}
    names = {round(float(s[0].proprio[0, 0]), 5): n for n, s in enumerate(table.episodes())}
    ages = []
    for _ in range(20):
        batch = table.sample(200, timeout_s=5.0)
        starts = [
            batch.proprio[w][batch.timesteps[w] == 0][-1, 0] if (batch.timesteps[w] == 0).any() else None
            for w in range(200)
        ]
        ages += [newest[names[round(float(s), 5)]] * 4 for s in starts if s is not None]
    # Half of the draws are of the 60 newest steps, give or take the ends of segments.
    assert 0.45 < np.mean(np.array(ages) <= 60) < 0.55


def test_what_is_gone_weighs_nothing(make_sharded, make_episode):
    """Steps that eviction took from one shard must not draw readers there."""
    table = make_sharded(sampler=Prioritised(), capacity_steps=180)
    fill(table, make_episode, [20] * 5)
    table.sample(8, timeout_s=5.0)
    fill(table, make_episode, [20] * 40)
    table.sample(8, timeout_s=5.0)
    for shard in table.shards:
        state = shard.state()
        assert shard.windows._follower.sampler._tree.total == pytest.approx(state.steps)


def test_the_limiter_is_that_of_the_whole(make_sharded, make_episode):
    limiter = LimiterConfig(min_steps=40, samples_per_insert=2.0, error_buffer_steps=60)
    table = make_sharded(limiter=limiter)
    fill(table, make_episode, [10] * 3)
    with pytest.raises(ReplayWait, match="30 steps of complete episodes stored on 3 servers, min_steps 40"):
        table.sample(1, timeout_s=0.1)
    table.append_all(make_episode("last", 10), timeout_s=5.0)
    batch = table.sample(20, timeout_s=5.0)
    assert batch.num_windows == 20
    state = table.limiter_state()
    assert state.config == limiter
    assert state.drawable_steps == 40
    assert state.balance == pytest.approx(-20)
    balances = [shard.limiter_state().balance for shard in table.shards]
    assert np.ptp(balances) < 1e-9
    table.sample(41, timeout_s=5.0)
    with pytest.raises(ReplayWait, match=r"balance -61\.0 windows, error buffer 60"):
        table.sample(1, timeout_s=0.1)
    assert table.state().tables[0].samples_waited == 2
    assert table.state().tables[0].sampled == 61
    assert table.stats().steps_sampled == 61
    table.override_limiter(LimiterConfig(min_steps=1))
    assert table.sample(100, timeout_s=5.0).num_windows == 100


def test_a_limited_writer_and_a_limited_reader_never_stop_each_other(make_sharded, make_episode):
    """The hash may send many episodes in a row to one server, whose share of the limiter is used up first."""
    limiter = LimiterConfig(min_steps=30, samples_per_insert=1.0, error_buffer_steps=12)
    table = make_sharded(limiter=limiter, capacity_steps=300)
    one_sided = [f"x{n}" for n in range(2000) if shard_of(f"x{n}", 3) == 0][:30]
    failures = []

    def write():
        try:
            for name in one_sided:
                table.append_all(make_episode(name, 8), timeout_s=20.0)
        except ReplayWait as error:
            failures.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    sampled = 0
    while sampled < 30 * 8 - 34:
        sampled += table.sample(4, timeout_s=20.0).num_windows
    writer.join()
    assert failures == []
    assert abs(table.limiter_state().balance) <= 12 + T


def test_writers_of_one_server_may_use_the_buffer_of_the_whole(make_sharded, make_episode):
    limiter = LimiterConfig(min_steps=3, samples_per_insert=1.0, error_buffer_steps=60)
    table = make_sharded(limiter=limiter)
    one_sided = [f"x{n}" for n in range(2000) if shard_of(f"x{n}", 3) == 0]
    inserted = 0

    def fill_up():
        nonlocal inserted
        for name in one_sided:
            inserted += len(table.append_all(make_episode(name, 4), timeout_s=0.5))

    with pytest.raises(ReplayWait, match="the limiter makes inserts wait"):
        fill_up()
    assert 60 <= 4 * inserted <= 60 + 3 * 4 + 4
    assert table.limiter_state().balance > 60


def test_capacity_is_split(make_sharded, make_episode):
    table = make_sharded(capacity_steps=180)
    fill(table, make_episode, [10] * 60)
    assert [shard.state().steps for shard in table.shards] == [60] * 3
    assert table.sample(32, timeout_s=5.0).num_windows == 32


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"capacity_steps": 3001}, "capacity_steps 3001 must be a multiple of the 3 servers, 3000"),
        ({"sampler": Stratified(shares={"demo": 1.0})}, "stratified"),
        ({"sampler": ByTask()}, "bytask"),
        (
            {"capacity_steps": 150, "limiter": LimiterConfig(min_steps=31)},
            "50 on each of 3 servers must be at least 51",
        ),
        ({"table": "nothing"}, "no table 'nothing'"),
    ],
)
def test_what_cannot_be_split_is_refused(make_sharded, settings, words):
    with pytest.raises((ConfigError, NotFound), match=words):
        make_sharded(**settings)


def test_another_number_or_order_of_servers_is_refused(make_sharded, servers):
    urls = [server.url for server in servers]
    name = make_sharded().config.name
    make_sharded(name=name)
    with pytest.raises(ConfigError, match="num_shards 2 against 3"):
        make_sharded(name=name, urls=urls[:2], capacity_steps=2000)
    with pytest.raises(ConfigError, match="shard 0 lies on server 1 of the 3"):
        make_sharded(name=name, urls=[urls[1], urls[0], urls[2]])
    with pytest.raises(ConfigError, match="created over several servers"):
        refuse_shards(urls[0], name)
    refuse_shards(urls[1], name + "-other")
    with pytest.raises(ConfigError, match="expected at least 2"):
        make_sharded(urls=urls[:1])
    single = RedisReplayTable(urls[2], SPEC, BufferConfig(name="single"))
    single.close()
    with pytest.raises(ConfigError, match="created on a single server"):
        make_sharded(name="single")


def test_one_shard_can_be_opened_by_its_name(make_sharded, make_episode, servers):
    table = make_sharded()
    fill(table, make_episode, [9] * 4)
    shard = RedisReplayTable.open(servers[1].url, f"{table.config.name}:1")
    assert [s[0].episode_id for s in shard.episodes()] == [s[0].episode_id for s in table.shards[1].episodes()]
    shard.close()


def test_on_policy_queues_work_shard_by_shard(make_sharded, make_episode):
    table = make_sharded(tables=(TableConfig(name="q", sampler=Fifo()),))
    fill(table, make_episode, [4] * 9)
    taken = [e for shard in table.shards for e in EpisodeQueue(shard, "me").take(9, timeout_s=5.0)]
    assert {episode.segments[0].episode_id for episode in taken} == {f"e{n}" for n in range(9)}
    with pytest.raises(ConfigError, match="FIFO"):
        table.sample(1, timeout_s=0.2)


def test_windows_lost_on_one_server_are_drawn_anew_on_all(make_sharded, make_episode, tmp_path):
    spec = make_spec(cameras=(CameraSpec(name="c", height=3, width=2),))
    images = [EmbeddedServer(tmp_path / f"i{n}", append_only=False) for n in range(3)]
    try:
        table = make_sharded(spec=spec, images_urls=[server.url for server in images])
        fill(table, make_episode, [9] * 12, spec=spec)
        here = [shard.state().complete for shard in table.shards]
        os.kill(images[1].pid, signal.SIGKILL)
        while images[1].alive:
            time.sleep(0.01)
        images[1] = EmbeddedServer(tmp_path / "i1", append_only=False)
        end = time.monotonic() + 30.0
        while not table.state().discarded:
            assert time.monotonic() < end, "the lost episodes are never found"
            assert table.sample(64, timeout_s=20.0).num_windows == 64
        assert table.state().discarded == here[1]
        assert [shard.state().complete for shard in table.shards] == [here[0], 0, here[2]]
        batch = table.sample(64, timeout_s=5.0)
        assert set((batch.items % 3).tolist()) == {0, 2}
        table.close()
    finally:
        for server in images:
            server.close()


def test_a_killed_server_is_named_and_the_others_take_episodes(make_sharded, make_episode, tmp_path):
    running = [EmbeddedServer(tmp_path / f"s{n}") for n in range(3)]
    try:
        table = make_sharded(urls=[server.url for server in running])
        fill(table, make_episode, [9] * 12)
        before = table.sample(16, timeout_s=5.0)
        assert before.num_windows == 16
        os.kill(running[2].pid, signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(Unreachable, match=r"shard 2 of 3: Redis at .*s2/server\.sock does not answer"):
            table.sample(16, timeout_s=0.5)
        with pytest.raises(Unreachable, match="shard 2 of 3"):
            table.stats()
        new = {shard_of(f"n{n}", 3): f"n{n}" for n in range(20)}
        segments = {shard: make_episode(name, 9) for shard, name in new.items()}
        for shard in (0, 1):
            assert table.append_all(segments[shard], timeout_s=2.0) == ["inserted"] * 3
        other = [replace(s, episode_id=s.episode_id + "!") for s in segments[0]]
        assert shard_of(other[0].episode_id, 3) in (0, 1, 2)
        with pytest.raises(Unreachable, match="shard 2"):
            table.append_all([*segments[2], *segments[0]], timeout_s=0.5)
        assert time.monotonic() - start < 25.0
        running[2] = EmbeddedServer(tmp_path / "s2")
        assert table.append_all(segments[2], timeout_s=5.0) == ["inserted"] * 3
        assert table.state().complete == 15
        assert len({item % 3 for item, _ in steps_of(table.sample(200, timeout_s=5.0))}) == 3
        table.close()
    finally:
        for server in running:
            server.close()
