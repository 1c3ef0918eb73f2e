"""Drawing: the right windows, from complete episodes only, each step as likely as any other."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import redis
from window_truth import assert_windows_are_cut_from, expected_window, joined

from vla_dist.core.errors import ConfigError, IntegrityError, ReplayWait
from vla_dist.core.specs import CameraSpec
from vla_dist.data.image_codec import ImageEncoding
from vla_dist.replay.limiter import LimiterConfig
from vla_dist.testing.fakes import make_spec


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


def test_a_window_fetches_only_the_steps_it_holds(make_table, make_episode, append_all, server):
    # Each segment takes 40 KB, of which a window of 2 steps needs a twentieth.
    table = make_table(spec=make_spec(proprio_dim=250), num_steps=40, context_steps=2)
    append_all(table, make_episode("e", 20, spec=table.spec, num_steps=40))
    table.sample(1, timeout_s=5.0)
    with redis.Redis.from_url(server.url) as client:
        before = client.info("stats")["total_net_output_bytes"]
        table.sample(50, timeout_s=5.0)
        assert client.info("stats")["total_net_output_bytes"] - before < 50 * 2 * 1200 + 20_000


def test_the_types_are_those_promised(make_table, make_episode, append_all):
    table = make_table()
    append_all(table, make_episode("e", 10))
    batch = table.sample(3, timeout_s=5.0)
    for name in ("proprio", "actions", "target_actions", "rewards", "returns_to_go"):
        assert getattr(batch, name).dtype == np.float32, name
    for name in ("timesteps", "episode_lengths", "policy_versions", "items"):
        assert getattr(batch, name).dtype == np.int64, name
    assert batch.padding_mask.dtype == batch.success.dtype == batch.interventions.dtype == bool
    assert batch.weights is None
    assert batch.ages_s.dtype == np.float64
    batch.proprio[:] = 0  # a caller may write into its batch


@pytest.mark.parametrize("encoding", ["raw", "lz4"])
def test_what_follows_a_window_is_given_to_the_end_of_the_episode(make_table, make_episode, append_all, encoding):
    spec = make_spec(cameras=(CameraSpec(name="front", height=8, width=8),))
    encodings = {"front": ImageEncoding.parse(encoding)}
    table = make_table(spec=spec, context_steps=3, future_steps=5, image_encodings=encodings)
    episodes = {}
    for number, length in enumerate((3, 9, 11)):
        episode = make_episode(f"e{number}", length, instruction=f"words {number}", spec=spec)
        append_all(table, episode)
        episodes[f"words {number}"] = episode

    batch = table.sample(60, timeout_s=5)
    assert_windows_are_cut_from(batch, episodes, 3)
    assert batch.future_target_actions.shape == (60, 5, spec.action_dim)
    for b in range(60):
        targets = joined(episodes[batch.instructions[b]], "target_actions")
        after = targets[int(batch.timesteps[b, -1]) + 1 :][:5]
        np.testing.assert_array_equal(batch.future_mask[b], np.arange(5) < len(after))
        np.testing.assert_array_equal(batch.future_target_actions[b, : len(after)], after)
        assert not batch.future_target_actions[b, len(after) :].any()
    # Windows of the whole of an episode's future and of none of it were both among them.
    assert batch.future_mask.all(axis=1).any()
    assert (~batch.future_mask).all(axis=1).any()


@pytest.mark.parametrize("context_steps", [1, 7])
def test_frames_of_windows_across_borders(make_table, make_episode, append_all, context_steps):
    spec = make_spec(
        cameras=(
            CameraSpec(name="raw", height=2, width=3),
            CameraSpec(name="small", height=4, width=1),
            CameraSpec(name="real", height=8, width=8),
        )
    )
    encodings = {"small": ImageEncoding(kind="lz4"), "real": ImageEncoding(kind="jpeg", quality=95)}
    table = make_table(spec=spec, context_steps=context_steps, image_encodings=encodings)
    episodes = {}
    for number, length in enumerate([1, 4, 5, 13]):
        instruction = f"episode {number}"
        episodes[instruction] = make_episode(f"e{number}", length, spec=spec, seed=number, instruction=instruction)
        for segment in episodes[instruction]:
            # JPEG keeps plain frames: the first pixel's colour tells which frame it is.
            segment.images["real"][:] = segment.images["real"][:, :1, :1]
        append_all(table, episodes[instruction])
    batch = table.sample(80, timeout_s=5.0)
    real = batch.images.pop("real")
    assert real.shape == (80, context_steps, 8, 8, 3)
    assert batch.images["raw"].dtype == real.dtype == np.uint8
    assert_windows_are_cut_from(batch, episodes, context_steps)
    for b in range(80):
        frames = np.concatenate([s.images["real"][: s.length] for s in episodes[batch.instructions[b]]])
        expected = expected_window(frames, int(batch.timesteps[b, -1]), context_steps)
        assert np.abs(real[b].astype(int) - expected).max() <= 3
    for mine, theirs in zip(table.episodes(), episodes.values(), strict=True):
        for found, expected in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(
                found.images["small"][: found.length], expected.images["small"][: found.length]
            )


def test_interventions_and_items_belong_to_their_windows(make_table, make_episode, append_all):
    table = make_table(context_steps=3)
    segments = make_episode("e", 10)
    segments[1].interventions[2] = True
    append_all(table, make_episode("before", 6))
    append_all(table, segments)
    batch = table.sample(200, timeout_s=5.0)
    mine = batch.episode_lengths == 10
    expected = (batch.timesteps == 6) & batch.padding_mask & mine[:, None]
    np.testing.assert_array_equal(batch.interventions, expected)
    # Rows are numbered in the order in which episodes became whole: two of the first, then three.
    np.testing.assert_array_equal(batch.items, np.where(mine, 2, 0) + batch.timesteps[:, -1] // 4)


def test_returns_of_long_episodes_keep_small_rewards(make_table, make_episode, append_all):
    table = make_table(spec=make_spec(max_episode_steps=400), context_steps=1)
    segments = make_episode("e", 399, spec=table.spec)
    rewards = np.full(400, 0.1, np.float32)
    rewards[250], rewards[300] = 1e7, -1e7  # Returns of the steps before are small again.
    segments = [replace(s, rewards=rewards[4 * s.segment_index :][:4]) for s in segments]
    append_all(table, segments)
    batch = table.sample(300, timeout_s=5.0)
    exact = rewards[:399].astype(np.float64)[::-1].cumsum()[::-1]
    np.testing.assert_allclose(batch.returns_to_go[:, 0], exact[batch.timesteps[:, 0]], rtol=1e-6)


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


def test_a_damaged_episode_is_named_and_can_be_discarded(make_table, make_episode, append_all):
    table = make_table()
    for name in ("good", "bad", "last"):
        append_all(table, make_episode(name, 10))
    entries = list(table.reader.entries(timeout_s=5.0))
    assert [entry["episode_id"] for entry in entries] == ["good", "bad", "last"]
    row = table.keys.row(entries[1]["digest"], 1)
    table.link.call([("SETRANGE", row, table.codec.steps_offset, b"\x07")], timeout_s=5.0)
    with pytest.raises(IntegrityError, match="episode 'bad', segment 1: row of 'bad'/1 differs from its checksum"):
        list(table.episodes())
    assert table.discard(entries[1]["completion"])
    assert not table.discard(entries[1]["completion"]), "only once"
    assert [s[0].episode_id for s in table.episodes()] == ["good", "last"]
    assert (table.stats().num_steps, table.limiter_state().drawable_steps) == (20, 20)
    assert set(table.sample(100, timeout_s=5.0).items.tolist()) <= {0, 1, 2, 6, 7, 8}


def test_a_row_in_the_place_of_another_is_named(make_table, make_episode, append_all):
    table = make_table()
    append_all(table, make_episode("one", 4))
    append_all(table, make_episode("two", 4))
    one, two = (table.keys.row(entry["digest"], 0) for entry in table.reader.entries(timeout_s=5.0))
    (row,) = table.link.call([("GET", two)], timeout_s=5.0)
    table.link.call([("SET", one, row)], timeout_s=5.0)
    with pytest.raises(IntegrityError, match="episode 'one', segment 0 holds segment 'two'/0"):
        list(table.episodes())
