from dataclasses import replace

import numpy as np
import pytest

from vla_dist.learner.freshness import Freshness


def test_staleness_counts_policies_alone_and_ages_all(make_table):
    batch = make_table().sample(4, timeout_s=1)
    batch = replace(
        batch,
        policy_versions=np.array([0, 3, 9, 1]),
        sources=("expert", "policy", "policy", "human"),
        ages_s=np.array([1.0, 2.0, 3.0, 100.0]),
    )
    freshness = Freshness()
    freshness.note(batch)
    found = freshness.drain(5)
    assert found["staleness_p50"] == pytest.approx(1.0)  # 2 versions behind, and one newer than ours: 0 behind
    assert found["staleness_p99"] == pytest.approx(1.98)
    assert found["sample_age_s_p50"] == pytest.approx(2.5)
    assert found["sample_age_s_p99"] == pytest.approx(np.percentile([1, 2, 3, 100], 99))
    assert (found["share_expert"], found["share_policy"], found["share_human"]) == (0.25, 0.5, 0.25)
    assert freshness.drain(5) == {}
    freshness.note(batch)
    assert "staleness_p50" not in freshness.drain(0)


def test_a_learner_tells_how_old_its_data_are(make_learner, make_table):
    table = make_table()
    real = table.sample
    table.sample = lambda num, *, timeout_s: replace(
        real(num, timeout_s=timeout_s),
        ages_s=np.full(num, 7.0),
        policy_versions=np.ones(num, np.int64),
        sources=("policy",) * num,
    )
    learner = make_learner(table=table, publish_updates=(0, 2))
    metrics = [learner.step() for _ in range(3)][-1]
    assert metrics["sample_age_s_p99"] == 7.0
    assert metrics["staleness_p50"] == 1.0  # two versions are published, the windows are of the first
    assert metrics["samples_per_insert"] > 0
    assert metrics["share_policy"] == 1.0
