"""When episodes leave: in their turn, before their places are used again, and without holding back who writes."""

import itertools

import pytest

from vla_dist.core.errors import ReplayWait
from vla_dist.replay.config import BufferConfig, Fifo, TableConfig
from vla_dist.replay.limiter import LimiterConfig
from vla_dist.replay.queue import EpisodeQueue
from vla_dist.replay.table import RedisReplayTable
from vla_dist.testing.fakes import make_segment, make_spec

T = 4
_names = (f"departures-{number}" for number in itertools.count())


def test_an_episode_that_outstays_a_turn_of_the_rings_is_not_drawn_more_often(server):
    """Its count of draws was that of the row that got its place, and so it was drawn in that row's stead."""
    tables = (TableConfig(name="few", max_draws=1), TableConfig(name="q", sampler=Fifo()))
    for seed in range(8):
        config = BufferConfig(name=next(_names), num_steps=1, capacity_steps=2 * 20 + 1, tables=tables)
        spec = make_spec(max_episode_steps=20)
        clients = [RedisReplayTable(server.url, spec, config, table=name, seed=seed) for name in ("few", "q")]
        queue = EpisodeQueue(clients[1], "consumer")
        for number in range(config.capacity_steps + 1):
            segment = make_segment(spec, episode_id=f"e{number}", num_steps=1, is_last=True)
            clients[0].append(segment, timeout_s=5.0)
            taken = queue.take(1, timeout_s=5.0)
            if number:
                queue.acknowledge(taken)  # All but the first leave when they are drawn.
            if number < config.capacity_steps:
                clients[0].sample(1, timeout_s=5.0)
        reader = RedisReplayTable(server.url, spec, config, table="few", seed=seed)
        newest = clients[0].reader.entries(after=config.capacity_steps, timeout_s=5.0)
        assert [entry["episode_id"] for entry in newest] == [f"e{config.capacity_steps}"]
        assert reader.sample(1, timeout_s=5.0).items.tolist() == [config.capacity_steps]
        assert clients[0].limiter_state().drawable_steps == 0
        for client in (*clients, reader):
            client.close()


def test_a_queue_that_ran_dry_still_holds_its_writers_back(server):
    """Steps that came while it was empty were not counted, those taken were: the balance fell without end."""
    limiter = LimiterConfig(samples_per_insert=1.0, error_buffer_steps=8)
    config = BufferConfig(
        name=next(_names),
        num_steps=T,
        capacity_steps=4 * 20,
        tables=(TableConfig(name="q", sampler=Fifo(), limiter=limiter),),
    )
    spec = make_spec(max_episode_steps=20)
    table = RedisReplayTable(server.url, spec, config)
    queue = EpisodeQueue(table, "consumer")
    numbers = itertools.count()

    def append() -> None:
        segment = make_segment(spec, episode_id=f"e{next(numbers)}", num_steps=T, is_last=True)
        table.append(segment, timeout_s=0.0)

    for _ in range(20):
        append()
        queue.acknowledge(queue.take(1, timeout_s=5.0))
    assert table.limiter_state().balance == 0
    for _ in range(3):
        append()
    with pytest.raises(ReplayWait, match="the limiter makes inserts wait"):
        append()
    table.close()


def test_a_discarded_episode_that_is_forgotten_and_begun_again_waits_its_turn(server):
    """Its name still stood where it had begun first, and it was evicted before older ones."""
    spec = make_spec(max_episode_steps=2 * T)
    config = BufferConfig(name=next(_names), num_steps=T, capacity_steps=5 * T, remembered_episodes=1)
    table = RedisReplayTable(server.url, spec, config)

    def append(name: str) -> None:
        table.append(make_segment(spec, episode_id=name, num_steps=T, is_last=True), timeout_s=5.0)

    for name in "abcd":
        append(name)
    assert table.discard(1)
    assert table.discard(2)  # Now nobody remembers the first.
    for name in "aefg":
        append(name)
    assert [segments[0].episode_id for segments in table.episodes()] == ["d", "a", "e", "f", "g"]
    table.close()
