"""Prioritised tables: what is scored is drawn accordingly, by every client, also after a restart."""

import os
import signal
from collections import Counter

import numpy as np
import pytest

from vla_dist.core.errors import ConfigError
from vla_dist.replay.config import Prioritised, TableConfig

EXACT = Prioritised(alpha=1.0, beta=1.0)


@pytest.fixture
def make_scored(make_table, make_episode):
    """Tables of episodes of one full segment each, so that row n is episode n and steps are alike within it."""

    def make(num_episodes=8, *, sampler=EXACT, **settings):
        table = make_table(sampler=sampler, **settings)
        table.append_all([make_episode(f"e{n}", 4, seed=n)[0] for n in range(num_episodes)], timeout_s=5.0)
        return table

    return make


def shares(table, *, num=4000):
    """Of each row in one batch; its draws come from equal parts of the total, so this is exact to one in ``num``."""
    counts = Counter(table.sample(num, timeout_s=5.0).items.tolist())
    return {row: count / num for row, count in counts.items()}


def assert_shares(table, priorities, *, num=4000):
    total = sum(priorities.values())
    found = shares(table, num=num)
    assert set(found) <= set(priorities)
    for row, priority in priorities.items():
        assert found.get(row, 0.0) == pytest.approx(priority / total, abs=2.1 / num), row


def test_new_priorities_shift_the_draws_of_every_client(make_scored, make_client, make_episode):
    table = make_scored()
    other = make_client(table, seed=3)
    assert_shares(other, dict.fromkeys(range(8), 1.0))
    priorities = {n: 0.25 * (n + 1) for n in range(8)}
    table.update_priorities(np.array(list(priorities)), np.array(list(priorities.values())))
    for client in (table, other, make_client(table, seed=4)):
        assert_shares(client, priorities)
    other.update_priorities(np.array([3, 5, 3]), np.array([9.0, 7.0, 0.5]))
    priorities.update({3: 0.5, 5: 7.0})
    # What nobody has scored has the highest so far, which 9 was for a moment.
    table.append(make_episode("new", 4)[0], timeout_s=5.0)
    priorities[8] = 9.0
    for client in (table, other, make_client(table, seed=5)):
        assert_shares(client, priorities)


def test_a_client_that_comes_after_the_highest_priority_left_knows_it(make_scored, make_client, make_episode):
    table = make_scored(2, capacity_steps=45)
    table.sample(1, timeout_s=5.0)
    table.update_priorities(np.array([0, 1]), np.array([50.0, 5.0]))
    for number in range(10):
        table.append(make_episode(f"f{number}", 4)[0], timeout_s=5.0)
        table.update_priorities(np.array([2 + number]), np.array([5.0]))
    later = make_client(table, seed=8)
    later.sample(1, timeout_s=5.0)
    table.append(make_episode("last", 4)[0], timeout_s=5.0)
    stored = {entry["completion"] - 1 for entry in table.reader.entries(timeout_s=5.0)}
    assert 0 not in stored
    for client in (table, later, make_client(table, seed=9)):
        assert_shares(client, {row: 50.0 if row == 12 else 5.0 for row in stored})


def test_steps_weigh_alike_within_segments_of_any_length(make_table, make_episode):
    table = make_table(sampler=EXACT, context_steps=1)
    table.append_all(make_episode("e", 6), timeout_s=5.0)
    table.update_priorities(np.array([0, 1]), np.array([1.0, 3.0]))
    batch = table.sample(4000, timeout_s=5.0)
    ends = Counter(batch.timesteps[:, 0].tolist())
    for step, weight in enumerate([1, 1, 1, 1, 3, 3]):
        assert ends[step] / 4000 == pytest.approx(weight / 10, abs=0.04)
    np.testing.assert_array_equal(batch.items, batch.timesteps[:, 0] // 4)


def test_importance_weights_undo_the_priorities(make_scored):
    table = make_scored(sampler=Prioritised(alpha=0.7, beta=0.5))
    priorities = np.arange(1.0, 9.0)
    table.update_priorities(np.arange(8), priorities)
    batch = table.sample(200, timeout_s=5.0)
    probabilities = priorities**0.7 / (priorities**0.7).sum() / 4
    expected = (32 * probabilities[batch.items]) ** -0.5
    np.testing.assert_allclose(batch.weights, expected / expected.max(), rtol=1e-5)


def test_windows_that_are_drawn_anew_are_weighed_with_the_others(make_scored, make_episode, monkeypatch):
    table = make_scored(10, capacity_steps=45)
    priorities = np.arange(1.0, 12.0)
    table.update_priorities(np.arange(10), priorities[:10])
    fetch, fetched = table.windows._fetch, []

    def fetch_after_eviction(*args):
        if not fetched:
            table.append_all([make_episode(f"f{n}", 4)[0] for n in range(2)], timeout_s=5.0)
            table.update_priorities(np.array([10, 11]), np.array([1e6, 11.0]))
        fetched.append(args)
        return fetch(*args)

    monkeypatch.setattr(table.windows, "_fetch", fetch_after_eviction)
    batch = table.sample(400, timeout_s=5.0)
    assert len(fetched) == 2, "the oldest row was gone"
    assert 10 in batch.items
    priorities = np.array([*range(1, 11), 1e6, 11.0])[batch.items]
    np.testing.assert_allclose(batch.weights, priorities.min() / priorities, rtol=1e-5)


def test_priorities_outlive_a_killed_server(make_server, make_scored, make_client):
    first = make_server()
    table = make_scored(url=first.url)
    priorities = {n: float(n + 1) for n in range(8)}
    table.update_priorities(np.array(list(priorities)), np.array(list(priorities.values())))
    assert_shares(table, priorities)
    os.kill(first.pid, signal.SIGKILL)
    first.close()
    make_server(first.directory)
    assert_shares(make_client(table, url=first.url, seed=7), priorities)
    assert_shares(table, priorities)
    table.update_priorities(np.array([0]), np.array([16.0]))
    assert_shares(table, {**priorities, 0: 16.0})


def test_items_that_left_are_passed_over(make_scored, make_client, make_episode):
    table = make_scored(11, capacity_steps=45)
    table.update_priorities(np.arange(11), np.full(11, 2.0))
    for number in range(50):
        table.append(make_episode(f"f{number}", 4)[0], timeout_s=5.0)
    live = range(50, 61)
    table.update_priorities(np.arange(50, 61), np.full(11, 1.0))
    # Rows 5 to 9 had the places of rows 50 to 54 before, rows 16 to 49 left since, the others never existed.
    stale = np.array([*range(5, 10), *range(16, 50), 61, 1000, 10**12])
    table.update_priorities(stale, np.full(len(stale), 77.0))
    for client in (table, make_client(table, seed=2)):
        assert_shares(client, dict.fromkeys(live, 1.0))


@pytest.mark.parametrize("extreme", [1e-60, 1e-6, 1e30, 3e38])
def test_extreme_priorities_mean_the_same_to_every_client(make_scored, make_client, extreme):
    table = make_scored(4)
    table.sample(1, timeout_s=5.0)
    table.update_priorities(np.arange(4), np.array([extreme, 1.0, 1.0, 2.0]))
    expected = {0: max(extreme, 1e-6), 1: 1.0, 2: 1.0, 3: 2.0}
    for client in (table, make_client(table)):
        assert_shares(client, expected)


def test_numbers_that_are_no_priorities_are_refused(make_scored, make_client):
    table = make_scored(4)
    for priorities in ([0.0], [-1.0], [np.nan], [np.inf], [1e39], [1.0, 2.0], []):
        with pytest.raises(ConfigError, match=r"1 items with \d priorities, .* expected as many"):
            table.update_priorities(np.array([0]), np.array(priorities))
    assert_shares(table, dict.fromkeys(range(4), 1.0))
    table.update_priorities(np.zeros(0, np.int64), np.zeros(0))


def test_other_tables_have_no_priorities(make_table, make_client):
    table = make_table(tables=(TableConfig(name="plain"), TableConfig(name="scored", sampler=EXACT)))
    with pytest.raises(ConfigError, match="table 'plain' is uniform: it has no priorities"):
        table.update_priorities(np.array([0]), np.array([1.0]))
    make_client(table, of="scored").update_priorities(np.array([0]), np.array([1.0]))


def test_two_prioritised_tables_have_priorities_of_their_own(make_table, make_client, make_episode):
    table = make_table(
        tables=(TableConfig(name="a", sampler=EXACT), TableConfig(name="b", sampler=EXACT, max_draws=90))
    )
    table.append_all([make_episode(f"e{n}", 4)[0] for n in range(3)], timeout_s=5.0)
    other = make_client(table, of="b")
    table.update_priorities(np.arange(3), np.array([1.0, 2.0, 3.0]))
    other.update_priorities(np.arange(3), np.array([5.0, 3.0, 2.0]))
    assert_shares(table, {0: 1.0, 1: 2.0, 2: 3.0})
    assert_shares(other, {0: 5.0, 1: 3.0, 2: 2.0}, num=100)


def test_removal_by_use_follows_the_priorities(make_scored):
    table = make_scored(4, max_draws=10)
    table.update_priorities(np.arange(4), np.array([1.0, 1.0, 1.0, 97.0]))
    counts = Counter()
    for _ in range(20):
        counts.update(table.sample(2, timeout_s=5.0).items.tolist())
    assert counts == dict.fromkeys(range(4), 10)
