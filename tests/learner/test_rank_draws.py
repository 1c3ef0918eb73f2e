"""Ranks on one replay: what each draws, and from what."""

import numpy as np
import pytest

from vla_dist.core.errors import ReplayWait
from vla_dist.replay.config import BufferConfig, Fifo, Stratified, TableConfig
from vla_dist.replay.limiter import LimiterConfig
from vla_dist.replay.queue import EpisodeQueue
from vla_dist.replay.server import EmbeddedServer
from vla_dist.replay.sharing import ONLY_READER, Reader
from vla_dist.replay.table import RedisReplayTable
from vla_dist.testing.fakes import make_segment, make_spec

SPEC = make_spec()
NUM_EPISODES = 40


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with EmbeddedServer(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def make_rank(server, request):
    """The table of a rank; all share one buffer of the test."""
    opened = []

    def make(seed, *, sampler=None, limiter=None, reader=ONLY_READER):
        table = TableConfig(**({"sampler": sampler} if sampler else {}), limiter=limiter or LimiterConfig())
        config = BufferConfig(name=request.node.name, num_steps=8, context_steps=2, reader=reader, tables=(table,))
        opened.append(RedisReplayTable(server.url, SPEC, config, seed=seed))
        return opened[-1]

    yield make
    for table in opened:
        table.close()


def fill(table, *, sources=("expert",)):
    for index in range(NUM_EPISODES):
        segment = make_segment(SPEC, episode_id=f"episode-{index}", is_last=True, success=index % 2 == 0, seed=index)
        object.__setattr__(segment, "source", sources[index % len(sources)])
        table.append(segment, timeout_s=5)


def identity(batch):
    return list(zip(batch.items.tolist(), batch.timesteps[:, -1].tolist(), strict=True))


def test_no_two_ranks_draw_a_window_and_together_they_draw_all(make_rank):
    ranks = [make_rank(10_000 + rank, reader=Reader(index=rank, num=3)) for rank in range(3)]
    fill(ranks[0])
    drawn = [[window for _ in range(40) for window in identity(rank.sample(32, timeout_s=5))] for rank in ranks]
    steps = [set(windows) for windows in drawn]
    assert all(not steps[a] & steps[b] for a, b in ((0, 1), (0, 2), (1, 2)))
    assert len(set.union(*steps)) == NUM_EPISODES * 8
    again = identity(make_rank(10_000, reader=Reader(num=3)).sample(32, timeout_s=5))
    assert again == drawn[0][:32], "a rank started with the same seed repeats itself, so each start has its own"


def test_consumers_of_a_queue_share_episodes_without_a_duplicate(make_rank):
    ranks = [make_rank(rank, sampler=Fifo()) for rank in range(2)]
    fill(ranks[0])
    queues = [EpisodeQueue(table, f"rank-{rank}") for rank, table in enumerate(ranks)]
    taken = [[], []]
    for _ in range(4):
        for rank, queue in enumerate(queues):
            episodes = queue.take(5, timeout_s=5)
            taken[rank] += [episode.segments[0].episode_id for episode in episodes]
            queue.acknowledge(episodes)
    assert len(taken[0]) == len(taken[1]) == 20
    assert len({*taken[0], *taken[1]}) == NUM_EPISODES


def test_strata_hold_their_shares(make_rank):
    table = make_rank(3, sampler=Stratified(shares={"demo": 0.6, "success": 0.3, "failure": 0.1}))
    # Every eighth episode is a demonstration, and yet most windows are of one.
    fill(table, sources=("expert", *["policy"] * 7))
    batches = [table.sample(64, timeout_s=5) for _ in range(20)]
    sources = np.concatenate([np.array(batch.sources) for batch in batches])
    succeeded = np.concatenate([batch.success for batch in batches])
    assert np.mean(sources == "expert") == pytest.approx(0.6, abs=0.06)
    assert np.mean((sources == "policy") & succeeded) == pytest.approx(0.3, abs=0.06)
    assert np.mean((sources == "policy") & ~succeeded) == pytest.approx(0.1, abs=0.04)


def test_the_replay_ratio_is_a_ceiling_for_all_ranks_together(make_rank):
    limiter = LimiterConfig(samples_per_insert=2.0, error_buffer_steps=1000.0)
    ranks = [make_rank(rank, limiter=limiter) for rank in range(2)]
    fill(ranks[0])
    drawn, refused = 0, 0
    while refused < 2:
        for rank in ranks:
            try:
                drawn += rank.sample(32, timeout_s=0.1).num_windows
            except ReplayWait:
                refused += 1
    # Two windows for each inserted step since sampling could begin, the buffer, and the call that overshot it.
    assert 1000 < drawn <= 2 * NUM_EPISODES * 8 + 1000 + 32
