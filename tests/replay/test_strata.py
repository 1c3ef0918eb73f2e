"""Shares of strata in each batch, on the real replay: exact to a window, for one reader and for several together."""

import dataclasses
import uuid
from collections import Counter

import numpy as np
import pytest

from vla_dist.core.errors import ConfigError
from vla_dist.replay.config import BufferConfig, Stratified, TableConfig
from vla_dist.replay.limiter import LimiterConfig
from vla_dist.replay.samplers import _apportioned
from vla_dist.replay.sharing import ONLY_READER, Reader
from vla_dist.replay.table import RedisReplayTable
from vla_dist.testing.fakes import make_segment, make_spec

SPEC = make_spec()


@pytest.fixture
def make_reader(server):
    """Readers of one buffer, which is the test's own."""
    opened, name = [], f"strata-{uuid.uuid4().hex}"

    def make(shares, *, reader=ONLY_READER, seed=0, future_steps=0):
        limiter = LimiterConfig(min_steps=1, samples_per_insert=None)
        table = TableConfig(sampler=Stratified(shares=shares), limiter=limiter)
        config = BufferConfig(
            name=name, num_steps=8, context_steps=2, future_steps=future_steps, reader=reader, tables=(table,)
        )
        opened.append(RedisReplayTable(server.url, SPEC, config, seed=seed))
        return opened[-1]

    yield make
    for table in opened:
        table.close()


def append(table, name, *, source="policy", success=True, intervened=False):
    segment = make_segment(SPEC, episode_id=name, num_steps=8, success=success, is_last=True)
    interventions = np.arange(8) >= (4 if intervened else 8)
    table.append(dataclasses.replace(segment, source=source, interventions=interventions), timeout_s=5.0)


def fill(table):
    """Far more episodes of policies than demonstrations."""
    for number in range(3):
        append(table, f"demo-{number}", source="expert")
    for number in range(40):
        append(table, f"policy-{number}", success=number % 4 != 0)
    for number in range(5):
        append(table, f"corrected-{number}", intervened=True)


def origin_of(batch, row):
    return "demo" if batch.sources[row] == "expert" else "success" if batch.success[row] else "failure"


def test_half_of_each_batch_is_prior_data_however_little_of_it_there_is(make_reader):
    table = make_reader({"demo": 0.5, "policy": 0.5})
    fill(table)
    for _ in range(20):
        batch = table.sample(32, timeout_s=5.0)
        assert Counter(batch.sources) == {"expert": 16, "policy": 16}


def test_without_demonstrations_the_policy_fills_the_batch(make_reader):
    table = make_reader({"demo": 0.5, "policy": 0.5})
    append(table, "only")
    assert Counter(table.sample(8, timeout_s=5.0).sources) == {"policy": 8}


def test_parts_that_are_no_whole_number_are_rounded_and_right_over_batches(make_reader):
    table = make_reader({"demo": 0.3, "success": 0.6, "failure": 0.1})
    fill(table)
    counts = Counter()
    for _ in range(30):
        batch = table.sample(8, timeout_s=5.0)
        found = Counter(origin_of(batch, row) for row in range(8))
        assert found["demo"] in (2, 3)
        assert found["failure"] in (0, 1)
        counts += found
    assert abs(counts["demo"] - 72) <= 1
    assert abs(counts["failure"] - 24) <= 1


def test_ranks_that_draw_in_step_hold_the_shares_together(make_reader):
    """Two demonstrations in 8 windows of all ranks are half a window of each rank."""
    ranks = [
        make_reader({"demo": 0.25, "policy": 0.75}, reader=Reader(index=rank, num=4), seed=rank) for rank in range(4)
    ]
    fill(ranks[0])
    own = []
    for _ in range(25):
        counts = [Counter(rank.sample(2, timeout_s=5.0).sources)["expert"] for rank in ranks]
        assert sum(counts) == 2
        own.append(counts)
    assert np.array(own).max() == 1
    assert (np.array(own).sum(0) > 0).all()


def test_apportioned_counts_of_all_ranks_are_those_of_one_draw():
    rng = np.random.default_rng(0)
    for _ in range(200):
        shares, num, ranks, phase = (
            rng.random(4) + 0.01,
            int(rng.integers(1, 20)),
            int(rng.integers(1, 9)),
            rng.random(),
        )
        parts = sum(_apportioned(num, shares, phase + rank / ranks) for rank in range(ranks))
        whole = _apportioned(num * ranks, shares, phase * ranks)
        assert parts.sum() == num * ranks
        np.testing.assert_array_equal(parts, whole)


def test_the_whole_and_a_part_of_it_are_refused_together():
    with pytest.raises(ConfigError, match=r"strata \['success'\] are parts of 'policy'"):
        Stratified(shares={"policy": 0.5, "success": 0.5})


def test_windows_know_of_takeovers_that_come_after_them(make_reader):
    table = make_reader({"demo": 0.5, "policy": 0.5}, future_steps=3)
    append(table, "corrected", intervened=True)
    batch = table.sample(64, timeout_s=5.0)
    newest = batch.timesteps[:, -1:]
    steps = newest + np.arange(1, 4)
    np.testing.assert_array_equal(batch.future_interventions, (steps >= 4) & (steps < 8))
    assert batch.future_interventions.any(1).sum() not in (0, 64)
