"""A client's copy of the index follows the buffer's streams, and starts again where it lost them."""

import numpy as np
import pytest

from vla_dist.core.errors import ReplayWait
from vla_dist.replay import following
from vla_dist.replay.config import Prioritised, Recency
from vla_dist.replay.limiter import LimiterConfig

EXACT = Prioritised(alpha=1.0, beta=1.0)


def append_many(table, make_episode, names, *, length=20):
    """One call each, so that each departure is an entry of its own."""
    for name in names:
        table.append_all(make_episode(name, length, instruction=name), timeout_s=5.0)


def copy_of(table):
    """Numbers and lengths of the rows that a client may draw, and the tasks, sources and returns it knows of them."""
    index = table.windows._follower.index
    rows = index.rows
    may = rows["length"] > 0
    episodes = rows["episode"][may]
    return [
        *(rows[name][may].tolist() for name in ("number", "length", "segment", "policy_version", "tail_return")),
        index.episodes["completion"][episodes].tolist(),
        [index.tasks.by_number[n] for n in index.episodes["task"][episodes]],
        index.live_steps,
    ]


@pytest.fixture
def counted_fetches(monkeypatch):
    """How many windows of each fetch were gone."""

    def count(table):
        fetch, gone = table.windows._fetch, []

        def counting(*args):
            batch, missing = fetch(*args)
            gone.append(int(missing.sum()))
            return batch, missing

        monkeypatch.setattr(table.windows, "_fetch", counting)
        return gone

    return count


def test_a_copy_that_missed_departures_starts_again(make_table, make_client, make_episode, counted_fetches):
    table = make_table(capacity_steps=60)
    writer = make_client(table)
    append_many(writer, make_episode, ["a", "b"])
    assert set(table.sample(100, timeout_s=5.0).instructions) == {"a", "b"}
    gone = counted_fetches(table)
    append_many(writer, make_episode, "cdefg")
    # As after 65,536 departures: all but the last are forgotten.
    writer.link.call([("XTRIM", table.keys.gone, "MAXLEN", 1)], timeout_s=5.0)
    batch = table.sample(100, timeout_s=5.0)
    assert set(batch.instructions) == {"e", "f", "g"}
    assert gone == [0], "no departed episode was drawn"
    assert table.stats().steps_sampled == 200, "charged once"


def test_a_copy_that_missed_priorities_starts_again(make_table, make_client, make_episode):
    table = make_table(sampler=EXACT)
    other = make_client(table)
    append_many(table, make_episode, "ab", length=4)
    table.sample(1, timeout_s=5.0)
    other.update_priorities(np.array([0]), np.array([5.0]))
    other.update_priorities(np.array([1]), np.array([1.0]))
    other.link.call([("XTRIM", table.keys.of_table("events", 0), "MAXLEN", 1)], timeout_s=5.0)
    assert np.bincount(table.sample(600, timeout_s=5.0).items) == pytest.approx([500, 100], abs=2)


def test_a_copy_that_missed_what_was_used_up_starts_again(make_table, make_client, make_episode, counted_fetches):
    table = make_table(sampler=Recency(half_life_steps=1e6), max_draws=1)
    other = make_client(table, seed=5)
    append_many(table, make_episode, "abcdefghij", length=4)
    table.sample(1, timeout_s=5.0)
    for _ in range(7):
        other.sample(1, timeout_s=5.0)
    other.link.call([("XTRIM", table.keys.of_table("events", 0), "MAXLEN", 1)], timeout_s=5.0)
    gone = counted_fetches(table)
    # Two draws of one of the two rows that are left use it up as well, so one of them is made anew.
    assert len(set(table.sample(2, timeout_s=5.0).items.tolist())) == 2
    assert gone in ([0], [1, 0])


@pytest.mark.parametrize("settings", [{}, {"sampler": EXACT}, {"max_draws": 3}])
def test_a_copy_that_follows_is_one_that_starts_anew(make_table, make_client, make_episode, monkeypatch, settings):
    monkeypatch.setattr(following, "_PAGE", 3)
    monkeypatch.setattr(following, "_RING_BYTES", 16)
    table = make_table(capacity_steps=90, **settings)
    writer, rng = make_client(table, seed=1), np.random.default_rng(0)
    append_many(writer, make_episode, ["first"])
    for turn in range(25):
        lengths = rng.integers(1, 21, rng.integers(0, 12)).tolist()
        for n, length in enumerate(lengths):
            # One call each: many entries in each stream.
            versions = {"policy_version": turn, "task": f"t{n % 3}"}
            writer.append_all(make_episode(f"{turn}-{n}", length, **versions), timeout_s=5.0)
            if "sampler" in settings:
                writer.update_priorities(np.array([10 * turn + n, n]), rng.uniform(0.1, 9.0, 2))
        if "max_draws" in settings:
            writer.sample(int(rng.integers(1, 6)), timeout_s=5.0)
        fresh = make_client(table, seed=2)
        batches = [client.sample(1, timeout_s=5.0) for client in (fresh, table)]
        assert all(batch.num_windows == 1 for batch in batches)
        if "max_draws" in settings:
            # Draws of the one may have used up what the other still holds.
            (_,) = fresh.windows._follower.exchange([("TIME",)], following.Deadline(5.0))
            (_,) = table.windows._follower.exchange([("TIME",)], following.Deadline(5.0))
        assert copy_of(table) == copy_of(fresh)


def test_a_copy_of_nothing_follows_too(make_table, make_client, make_episode):
    table = make_table()
    with pytest.raises(ReplayWait, match="0 steps of complete episodes"):
        table.sample(1, timeout_s=0.0)
    append_many(make_client(table), make_episode, "a", length=3)
    assert table.sample(2, timeout_s=5.0).instructions == ("a", "a")


def test_a_copy_that_starts_again_charges_the_limiter_once(make_table, make_client, make_episode):
    limiter = LimiterConfig(samples_per_insert=1.0, error_buffer_steps=50.0)
    table = make_table(capacity_steps=60, limiter=limiter)
    append_many(table, make_episode, "ab")
    table.sample(60, timeout_s=5.0)
    append_many(make_client(table), make_episode, "cde")
    table.link.call([("XTRIM", table.keys.gone, "MAXLEN", 1)], timeout_s=5.0)
    before = table.limiter_state().balance
    table.sample(7, timeout_s=5.0)
    assert table.limiter_state().balance == before - 7
