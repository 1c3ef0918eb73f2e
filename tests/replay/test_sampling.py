"""Drawing: the right windows, from complete episodes only, each step as likely as any other."""

import itertools
import threading
from collections import Counter

import numpy as np
import pytest

from vla_dist.core.errors import ConfigError, IntegrityError, ReplayWait
from vla_dist.core.specs import CameraSpec
from vla_dist.replay.draws import replaced
from vla_dist.replay.limiter import LimiterConfig
from vla_dist.replay.link import Deadline
from vla_dist.testing.fakes import make_spec


def joined(segments, name):
    """A column of the whole episode."""
    return np.concatenate([getattr(s, name)[: s.length] for s in segments])


def expected_window(column, end, context_steps):
    """K steps up to ``end``, zero before the episode began."""
    window = np.zeros((context_steps, *column.shape[1:]), column.dtype)
    for position in range(context_steps):
        step = end - (context_steps - 1 - position)
        if step >= 0:
            window[position] = column[step]
    return window


def assert_windows_are_cut_from(batch, episodes, context_steps):
    """Each window equals what a person would cut out of the raw episodes; the instruction names the episode."""
    for b in range(batch.num_windows):
        segments = episodes[batch.instructions[b]]
        rewards = joined(segments, "rewards").astype(np.float64)
        end = int(batch.timesteps[b, -1])
        columns = {name: joined(segments, name) for name in ("proprio", "actions", "target_actions", "rewards")}
        for name, column in columns.items():
            np.testing.assert_array_equal(getattr(batch, name)[b], expected_window(column, end, context_steps))
        to_go = np.array([rewards[step:].sum() for step in range(len(rewards))])
        np.testing.assert_allclose(batch.returns_to_go[b], expected_window(to_go, end, context_steps), rtol=1e-5)
        steps = np.arange(end - context_steps + 1, end + 1)
        np.testing.assert_array_equal(batch.timesteps[b], np.maximum(steps, 0))
        np.testing.assert_array_equal(batch.padding_mask[b], steps >= 0)
        assert batch.episode_lengths[b] == len(rewards)
        assert batch.success[b] == segments[-1].success
        last = segments[0]
        assert batch.tasks[b] == last.task
        assert batch.sources[b] == last.source
        assert batch.policy_versions[b] == last.policy_version
        for camera, windows in batch.images.items():
            frames = np.concatenate([s.images[camera][: s.length] for s in segments])
            np.testing.assert_array_equal(windows[b], expected_window(frames, end, context_steps))


@pytest.mark.parametrize("seed", range(8))
def test_windows_equal_those_cut_from_the_raw_episodes(make_table, make_episode, append_all, seed):
    rng = np.random.default_rng(seed)
    num_steps, context_steps = int(rng.integers(1, 6)), int(rng.integers(1, 13))
    table = make_table(num_steps=num_steps, context_steps=context_steps, seed=seed)
    # Always some that end at, one before and one after a border of segments.
    lengths = [1, num_steps, num_steps + 1, max(1, 2 * num_steps - 1), *rng.integers(1, 20, 4).tolist()]
    episodes = {}
    for number, length in enumerate(lengths):
        instruction = f"episode {number}"
        episodes[instruction] = make_episode(
            f"e{number}",
            length,
            num_steps=num_steps,
            success=number % 2 == 0,
            task=f"task-{number % 3}",
            seed=100 * seed + number,
            instruction=instruction,
            source=("expert", "policy", "human")[number % 3],
            policy_version=number,
        )
        append_all(table, episodes[instruction])
    batch = table.sample(1000, timeout_s=5.0)
    assert batch.num_windows == 1000
    assert set(batch.instructions) == set(episodes)
    assert_windows_are_cut_from(batch, episodes, context_steps)
    assert (batch.ages_s >= 0).all()
    assert (batch.ages_s < 60).all()


def test_a_window_asks_only_for_the_segments_it_touches(make_table, make_episode, append_all):
    table = make_table(context_steps=6)
    append_all(table, make_episode("e", 20))
    draws, _ = table._draw(200, Deadline(5.0), 5.0, charge=False)
    ends = draws["segment_index"].astype(int) * 4 + draws["offset"]
    touched = ends // 4 - np.maximum(ends - 5, 0) // 4 + 1
    assert set(touched.tolist()) == {1, 2, 3}
    np.testing.assert_array_equal((draws["segments"]["slot"] >= 0).sum(axis=1), touched)


def test_the_types_are_those_promised(make_table, make_episode, append_all):
    table = make_table()
    append_all(table, make_episode("e", 10))
    batch = table.sample(3, timeout_s=5.0)
    for name in ("proprio", "actions", "target_actions", "rewards", "returns_to_go"):
        assert getattr(batch, name).dtype == np.float32, name
    for name in ("timesteps", "episode_lengths", "policy_versions"):
        assert getattr(batch, name).dtype == np.int64, name
    assert batch.padding_mask.dtype == batch.success.dtype == bool
    assert batch.ages_s.dtype == np.float64
    batch.proprio[:] = 0  # a caller may write into its batch


def test_frames_of_windows_across_borders(make_table, make_episode, append_all):
    spec = make_spec(cameras=(CameraSpec(name="a", height=2, width=3), CameraSpec(name="b", height=4, width=1)))
    table = make_table(spec=spec, context_steps=7)
    episodes = {}
    for number, length in enumerate([1, 4, 5, 13]):
        instruction = f"episode {number}"
        episodes[instruction] = make_episode(f"e{number}", length, spec=spec, seed=number, instruction=instruction)
        append_all(table, episodes[instruction])
    batch = table.sample(80, timeout_s=5.0)
    assert batch.images["a"].shape == (80, 7, 2, 3, 3)
    assert batch.images["b"].dtype == np.uint8
    assert_windows_are_cut_from(batch, episodes, 7)


def test_unfinished_episodes_are_never_drawn(make_table, make_episode, append_all):
    table = make_table(context_steps=1)
    append_all(table, make_episode("done", 3, instruction="done"))
    append_all(table, make_episode("open", 20, instruction="open")[:-1])
    gap = make_episode("gap", 20, instruction="gap")
    append_all(table, [gap[0], *gap[2:]])
    assert set(table.sample(300, timeout_s=5.0).instructions) == {"done"}
    append_all(table, [gap[1]])
    assert set(table.sample(300, timeout_s=5.0).instructions) == {"done", "gap"}


def test_every_step_is_equally_likely(make_table, make_episode, append_all):
    table = make_table(context_steps=1, seed=11)
    lengths = [1, 3, 4, 5, 9, 17]
    for number, length in enumerate(lengths):
        append_all(table, make_episode(f"e{number}", length, instruction=str(number)))
    counts = Counter()
    for _ in range(10):
        batch = table.sample(1000, timeout_s=5.0)
        counts.update(zip(batch.instructions, batch.timesteps[:, 0].tolist(), strict=True))
    num_steps = sum(lengths)
    assert set(counts) == {(str(n), step) for n, length in enumerate(lengths) for step in range(length)}
    expected = 10_000 / num_steps
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    # 38 degrees of freedom: the mean is 38 and 1 in 1000 exceeds 70.7.
    assert 15 < chi_square < 71


def test_equal_seeds_draw_equal_windows_and_others_do_not(make_table, make_episode, append_all):
    name = "seeds"
    first = make_table(name=name, seed=5)
    for number in range(10):
        append_all(first, make_episode(f"e{number}", 20, seed=number))
    again, other = make_table(name=name, seed=5), make_table(name=name, seed=6)
    one, two, three = (table.sample(64, timeout_s=5.0).proprio for table in (first, again, other))
    np.testing.assert_array_equal(one, two)
    assert (one != three).any()
    assert (first.sample(64, timeout_s=5.0).proprio != one).any(), "the next batch is another one"


def test_an_empty_table_says_what_it_waits_for(make_table):
    table = make_table(limiter=LimiterConfig(min_steps=30))
    with pytest.raises(ReplayWait, match=r"no windows within 0\.1 s: .*0 steps of complete episodes.*min_steps 30"):
        table.sample(1, timeout_s=0.1)
    with pytest.raises(ConfigError, match="num_windows 0"):
        table.sample(0, timeout_s=0.1)


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


def test_eviction_gives_the_memory_back(make_table, make_episode, append_all, server):
    table = make_table(capacity_steps=45)
    for number in range(20):
        append_all(table, make_episode(f"e{number}", 20))
    rows = table._link.call([("EXISTS", *(f"{table._prefix}row:{slot}" for slot in range(100)))], timeout_s=5.0)
    assert rows == [10]
    assert not any(
        table._link.call([("EXISTS", f"{table._prefix}row:{slot}") for slot in range(12, 100)], timeout_s=5.0)
    )


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


def test_draws_whose_slots_were_given_away_are_made_anew(make_table, make_episode, append_all, monkeypatch):
    table = make_table(capacity_steps=45)
    for number in range(2):
        append_all(table, make_episode(f"old{number}", 20, instruction="old"))
    fetch = table._fetch
    calls = []

    def fetch_after_eviction(*args):
        if not calls:
            for number in range(3):
                append_all(table, make_episode(f"new{number}", 20, instruction="new", seed=number))
        calls.append(args)
        return fetch(*args)

    monkeypatch.setattr(table, "_fetch", fetch_after_eviction)
    batch = table.sample(30, timeout_s=5.0)
    assert len(calls) == 2
    assert set(batch.instructions) == {"new"}
    np.testing.assert_array_equal(batch.rewards[:, -1], batch.timesteps[:, -1])
    assert table.stats().steps_sampled == 30, "the second draw is not counted again"


def test_a_reader_that_eviction_outruns_is_told_so_in_time(make_table, make_episode, append_all, monkeypatch):
    table = make_table(capacity_steps=45)
    numbers = itertools.count()
    fetch = table._fetch

    def fetch_after_eviction(*args):
        for _ in range(3):
            append_all(table, make_episode(f"e{next(numbers)}", 20))
        return fetch(*args)

    append_all(table, make_episode("first", 20))
    monkeypatch.setattr(table, "_fetch", fetch_after_eviction)
    with pytest.raises(ReplayWait, match=r"5 of 5 windows were evicted.* for 0\.2 s; raise capacity_steps 45"):
        table.sample(5, timeout_s=0.2)


def test_only_windows_with_a_lost_slot_are_replaced(make_table, make_episode, append_all):
    table = make_table(context_steps=6)
    append_all(table, make_episode("e", 20))
    draws = np.zeros(3, table._draw_dtype)
    draws["episode_id"] = b"e"
    draws["segment_index"] = [0, 1, 2]
    rows = np.zeros(3, table.codec.row_dtype)
    rows["episode_id"] = [b"e", b"e", b"other"]
    rows["segment_index"] = [0, 1, 2]
    moved = rows.copy()
    moved["episode_id"], moved["segment_index"] = b"e", [0, 4, 2]
    window_rows = np.array([[-1, -1, 0], [-1, 0, 1], [-1, 1, 2]])

    class Drawn:
        pass

    Drawn.window_rows = window_rows
    assert replaced(draws, Drawn, rows, np.ones(3, bool)).tolist() == [False, False, True]
    assert replaced(draws, Drawn, rows, np.array([False, True, True])).tolist() == [True, True, True]
    assert replaced(draws, Drawn, moved, np.ones(3, bool)).tolist() == [False, True, True]


def test_readers_see_whole_episodes_while_writers_evict(make_table, make_episode, append_all):
    table = make_table(capacity_steps=60, context_steps=9)
    episodes = {}
    for number in range(60):
        instruction = f"episode {number}"
        episodes[instruction] = make_episode(f"e{number}", 5 + number % 14, seed=number, instruction=instruction)
    append_all(table, episodes["episode 0"])
    writer_table = make_table(name=table.config.name, capacity_steps=60, context_steps=9)

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


def test_a_foreign_row_is_an_integrity_error(make_table, make_episode, append_all):
    table = make_table()
    append_all(table, make_episode("e", 3))
    table._link.call([("SETRANGE", table._prefix + "row:0", 8, b"garbage")], timeout_s=5.0)
    with pytest.raises(IntegrityError, match="another Arrow header"):
        table.sample(1, timeout_s=1.0)
