"""Room for new episodes: the oldest leave whole, and readers notice nothing but that."""

import itertools
import threading

import numpy as np
import pytest
from window_truth import assert_windows_are_cut_from

from vla_dist.core.errors import ReplayWait
from vla_dist.core.specs import CameraSpec
from vla_dist.data.image_codec import ImageEncoding
from vla_dist.testing.fakes import make_spec


def test_the_oldest_episodes_make_room_whole(make_table, make_episode, append_all):
    table = make_table(capacity_steps=45, context_steps=9)
    episodes = {}
    for number in range(12):
        instruction = f"episode {number}"
        episodes[instruction] = make_episode(
            f"e{number}", 7 + number % 5, seed=number, instruction=instruction, task=f"t{number % 2}"
        )
        append_all(table, episodes[instruction])
        stats = table.stats()
        assert stats.num_steps <= 45
        kept = [s[0].instruction for s in table.episodes()]
        assert kept == list(episodes)[len(episodes) - len(kept) :], "the newest ones, none in part"
        assert stats.num_steps == sum(s.length for name in kept for s in episodes[name])
        assert stats.num_episodes == len(kept) == sum(stats.episodes_by_task.values())
        assert sum(stats.steps_by_source.values()) == stats.num_steps == table.limiter_state().drawable_steps
        batch = table.sample(60, timeout_s=5.0)
        assert set(batch.instructions) == set(kept)
        assert_windows_are_cut_from(batch, episodes, 9)
    assert len(kept) < 6
    assert table.stats().steps_inserted == sum(s.length for e in episodes.values() for s in e)


def test_the_newest_that_fit_are_kept(make_table, make_episode, append_all):
    table = make_table(capacity_steps=45)
    for number in range(5):
        append_all(table, make_episode(f"e{number}", 15))
    assert [s[0].episode_id for s in table.episodes()] == ["e2", "e3", "e4"]


def test_evicted_episodes_are_still_known(make_table, make_episode, append_all):
    table = make_table(capacity_steps=45, remembered_episodes=2)
    stored = [make_episode(f"e{number}", 20) for number in range(4)]
    for segments in stored:
        append_all(table, segments)
    assert [s[0].episode_id for s in table.episodes()] == ["e2", "e3"]
    assert table.has_episode("e0")
    assert append_all(table, stored[1]) == ["duplicate"] * 5
    append_all(table, make_episode("e4", 20))
    assert not table.has_episode("e0"), "only remembered_episodes are"
    assert table.has_episode("e1")


def test_eviction_gives_the_memory_back(make_table, make_episode, append_all, keys_of):
    table = make_table(spec=make_spec(cameras=(CameraSpec(name="c", height=2, width=2),)), capacity_steps=45)
    for number in range(20):
        append_all(table, make_episode(f"e{number}", 20, spec=table.spec))
    keys = keys_of(table)
    assert sum(":row:" in key for key in keys) == sum(":image:" in key for key in keys) == 10
    assert table.link.call([("LLEN", table.keys.prefix + "order")], timeout_s=5.0) == [2]
    assert table.link.call([("HLEN", table.keys.prefix + "completed")], timeout_s=5.0) == [2]


def test_an_episode_that_outlives_the_table_while_open_is_never_drawn(make_table, make_episode, append_all):
    table = make_table(capacity_steps=45)
    slow = make_episode("slow", 20, instruction="slow")
    append_all(table, slow[:2])
    for number in range(3):
        append_all(table, make_episode(f"e{number}", 20, instruction="quick"))
    assert append_all(table, slow) == [*["duplicate"] * 2, *["inserted"] * 3]
    assert table.has_episode("slow"), "its writer need not send it again"
    assert set(table.sample(200, timeout_s=5.0).instructions) == {"quick"}
    assert table.stats().num_steps <= 45


def test_draws_that_were_evicted_before_the_fetch_are_made_anew(make_table, make_episode, append_all, monkeypatch):
    table = make_table(capacity_steps=45)
    for number in range(2):
        append_all(table, make_episode(f"old{number}", 20, instruction="old"))
    fetch = table.windows._fetch
    calls = []

    def fetch_after_eviction(*args):
        if not calls:
            for number in range(3):
                append_all(table, make_episode(f"new{number}", 20, instruction="new", seed=number))
        calls.append(args)
        return fetch(*args)

    monkeypatch.setattr(table.windows, "_fetch", fetch_after_eviction)
    batch = table.sample(30, timeout_s=5.0)
    assert len(calls) == 2
    assert set(batch.instructions) == {"new"}
    np.testing.assert_array_equal(batch.rewards[:, -1], batch.timesteps[:, -1])
    assert table.stats().steps_sampled == 30, "the second draw is not counted again"


def test_a_reader_that_eviction_outruns_is_told_so_in_time(make_table, make_episode, append_all, monkeypatch):
    table = make_table(capacity_steps=45)
    numbers = itertools.count()
    fetch = table.windows._fetch

    def fetch_after_eviction(*args):
        for _ in range(3):
            append_all(table, make_episode(f"e{next(numbers)}", 20))
        return fetch(*args)

    append_all(table, make_episode("first", 20))
    monkeypatch.setattr(table.windows, "_fetch", fetch_after_eviction)
    with pytest.raises(ReplayWait, match=r"5 of 5 windows could not be read .* for 0\.2 s: .*raise capacity_steps 45"):
        table.sample(5, timeout_s=0.2)


def test_only_evicted_windows_are_drawn_anew(make_table, make_episode, append_all, monkeypatch):
    spec = make_spec(cameras=(CameraSpec(name="a", height=2, width=3), CameraSpec(name="b", height=2, width=2)))
    encodings = {"b": ImageEncoding(kind="lz4")}
    table = make_table(spec=spec, capacity_steps=45, image_encodings=encodings)
    episodes = {name: make_episode(name, 20, spec=spec, seed=ord(name), instruction=name) for name in "abc"}
    append_all(table, episodes["a"])
    append_all(table, episodes["b"])
    fetch, plans = table.windows._fetch, []

    def fetch_after_eviction(plan, *rest):
        if not plans:
            append_all(table, episodes["c"])
        plans.append(plan)
        return fetch(plan, *rest)

    monkeypatch.setattr(table.windows, "_fetch", fetch_after_eviction)
    batch = table.sample(40, timeout_s=5.0)
    first, second = plans
    kept = np.array(first.instructions) == "b"
    assert 0 < kept.sum() < 40
    assert len(second.numbers) == 40 - kept.sum()
    np.testing.assert_array_equal(batch.items[kept], first.numbers[kept])
    assert set(batch.instructions) == {"b", "c"}
    assert_windows_are_cut_from(batch, episodes, 6)


def test_readers_see_whole_episodes_while_writers_evict(make_table, make_client, make_episode, append_all):
    table = make_table(capacity_steps=60, context_steps=9)
    episodes = {}
    for number in range(60):
        instruction = f"episode {number}"
        episodes[instruction] = make_episode(f"e{number}", 5 + number % 14, seed=number, instruction=instruction)
    append_all(table, episodes["episode 0"])
    writer_table = make_client(table)

    def write():
        for segments in list(episodes.values())[1:]:
            append_all(writer_table, segments)

    writer = threading.Thread(target=write)
    writer.start()
    while writer.is_alive():
        assert_windows_are_cut_from(table.sample(16, timeout_s=5.0), episodes, 9)
        for segments in table.episodes(limit=2):
            assert sum(s.length for s in segments) == sum(s.length for s in episodes[segments[0].instruction])
    writer.join()


@pytest.mark.slow
def test_one_commit_may_evict_thousands_of_episodes(make_table, make_episode):
    # More than Lua can hold as the arguments of one call.
    spec = make_spec(proprio_dim=0, action_dim=1, max_episode_steps=16_384)
    table = make_table(spec=spec, num_steps=256, capacity_steps=32_800)
    table.append_all([make_episode(f"e{n}", 1, spec=spec, num_steps=256)[0] for n in range(9000)], timeout_s=60.0)
    table.sample(1, timeout_s=5.0)
    for name in ("first", "second"):
        table.append_all(make_episode(name, 16_384, spec=spec, num_steps=256, instruction=name), timeout_s=60.0)
    state = table.state()
    assert (state.steps, state.complete) == (32_800, 34)
    assert {"first", "second"} <= set(table.sample(200, timeout_s=5.0).instructions)
    assert table.windows._follower.index.live_steps == 32_800
