"""Readers that share a batch: no window twice, nothing left out, and distributions as one reader has them."""

from collections import Counter

import numpy as np
import pytest

from vla_dist.core.errors import ConfigError
from vla_dist.core.types import SOURCES
from vla_dist.replay.config import ByTask, Prioritised, Recency, Stratified, Uniform
from vla_dist.replay.index import EpisodeIndex
from vla_dist.replay.samplers import make_sampler
from vla_dist.replay.sharing import Reader

T = 4
LENGTHS = [1, 3, 4, 5, 9, 17, 2, 8, 6, 4]
POLICY = SOURCES.index("policy")
SAMPLERS = {
    "uniform": Uniform(),
    "recency": Recency(half_life_steps=100.0),
    "stratified": Stratified(shares={"demo": 0.5, "policy": 0.5}),
    "by_task": ByTask(),
    "prioritised": Prioritised(),
}


@pytest.fixture
def make_index(pack_entry):
    def make(lengths):
        index, row, entries = EpisodeIndex(T), 0, []
        for n, length in enumerate(lengths):
            entries.append(pack_entry(n + 1, row, length, source=POLICY if n % 3 else 0, task=f"task-{n % 2}"))
            row += -(-length // T)
        index.add(entries)
        return index

    return make


def draw(sampler, index, *, num=20_000, seed=0):
    """How often each (number of the row, offset) was drawn."""
    rng, counts = np.random.default_rng(seed), Counter()
    for _ in range(num // 100):
        drawn = sampler.draw(index, 100, rng)
        assert (drawn.offsets < index.rows["length"][drawn.rows]).all()
        counts.update(zip(index.rows["number"][drawn.rows].tolist(), drawn.offsets.tolist(), strict=True))
    return counts


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("num", [2, 3, 8])
def test_each_window_is_drawn_by_one_reader_and_each_step_by_some(make_index, name, num):
    index = make_index(4 * LENGTHS)
    drawn = [draw(make_sampler(SAMPLERS[name], Reader(index=i, num=num)), index, num=4000) for i in range(num)]
    steps = Counter(step for counts in drawn for step in counts)
    assert set(steps.values()) == {1}, "no window belongs to two readers"
    assert len(steps) == 4 * sum(LENGTHS), "every window belongs to one"


def test_all_readers_together_draw_as_one_does(make_index):
    index = make_index(LENGTHS)
    alone = draw(make_sampler(Uniform()), index, num=40_000)
    parts = [draw(make_sampler(Uniform(), Reader(index=i, num=4)), index, num=10_000, seed=i) for i in range(4)]
    for step, count in alone.items():
        # Readers own 14 or 15 of 59 steps; of some 680 draws of a step one standard deviation is 26.
        assert sum(part[step] for part in parts) == pytest.approx(count, rel=0.3)


def test_a_reader_draws_its_own_steps_alike_and_by_priority(make_index):
    index = make_index([T] * 6)
    sampler = make_sampler(Prioritised(alpha=1.0, beta=1.0), Reader(index=1, num=2))
    sampler.score(index, np.arange(6), np.array([1.0, 1.0, 1.0, 1.0, 1.0, 5.0]))
    counts = draw(sampler, index)
    of_row = Counter()
    for (row, offset), count in counts.items():
        assert (row + offset) % 2 == 1
        of_row[row] += count
    assert of_row[5] / of_row[0] == pytest.approx(5.0, rel=0.1)
    drawn = sampler.draw(index, 100, np.random.default_rng(0))
    weights = dict(zip(index.rows["number"][drawn.rows].tolist(), drawn.weights.tolist(), strict=True))
    assert weights[0] / weights[5] == pytest.approx(5.0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_reader_that_nothing_belongs_to_draws_from_everything(make_index, name):
    index = make_index([1])
    counts = [draw(make_sampler(SAMPLERS[name], Reader(index=i, num=3)), index, num=100) for i in range(3)]
    assert counts == [Counter({(0, 0): 100})] * 3


def test_a_reader_is_one_of_those_there_are():
    with pytest.raises(ConfigError, match=r"reader 2 of 2 must be within 0\.\.1"):
        Reader(index=2, num=2)
