from dataclasses import replace

import numpy as np
import pytest

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.core.specs import Dimension
from vla_dist.core.types import Batch
from vla_dist.models.actions import ActionCodec
from vla_dist.models.batch import to_train_batch
from vla_dist.models.conditioning import ReturnConditioning
from vla_dist.models.goals import GoalTable
from vla_dist.testing.fakes import make_spec

SPEC = make_spec(max_episode_steps=50)


def make_windows(num=3, steps=4):
    rng = np.random.default_rng(0)
    mask = np.ones((num, steps), bool)
    mask[0, :2] = False
    return Batch(
        proprio=rng.normal(size=(num, steps, 5)).astype(np.float32),
        actions=rng.uniform(-1, 1, (num, steps, 2)).astype(np.float32),
        target_actions=rng.uniform(-1, 1, (num, steps, 2)).astype(np.float32),
        rewards=np.ones((num, steps), np.float32),
        returns_to_go=np.arange(num * steps, dtype=np.float32).reshape(num, steps),
        timesteps=np.array([[0, 0, 0, 1], [3, 4, 5, 6], [1, 2, 3, 4]]),
        padding_mask=mask,
        episode_lengths=np.array([10, 20, 50]),
        success=np.array([True, True, False]),
        policy_versions=np.zeros(num, np.int64),
        instructions=("a", "b", "c"),
        tasks=("a", "b", "c"),
        sources=("expert",) * 3,
    )


def convert(batch, *, conditioning=None, num_steps=4, **more):
    return to_train_batch(
        batch,
        codec=ActionCodec.of(SPEC),
        conditioning=conditioning or ReturnConditioning(),
        max_episode_steps=50,
        goals=None,
        num_steps=num_steps,
        **more,
    )


def test_steps_to_success_are_counted_from_complete_episodes():
    values = convert(make_windows(), conditioning=ReturnConditioning(kind="steps_to_success", scale=50, target=-9))
    expected = [[0, 0, -10, -9], [-17, -16, -15, -14], [-50] * 4]
    np.testing.assert_allclose(values.returns_to_go * 50, expected, atol=1e-5)


def test_reward_returns_are_scaled_and_none_is_zero():
    batch = make_windows()
    values = convert(batch, conditioning=ReturnConditioning(kind="reward", scale=4, target=1)).returns_to_go
    np.testing.assert_allclose(values[1:], batch.returns_to_go[1:] / 4)
    assert not convert(batch).returns_to_go.any()


def test_steps_left_are_those_after_the_newest():
    assert convert(make_windows(), num_steps=2).steps_left.tolist() == [8, 13, 45]


def test_the_last_steps_are_kept_and_short_windows_refused():
    batch = make_windows()
    kept = convert(batch, num_steps=3)
    np.testing.assert_allclose(kept.states[1:], batch.proprio[1:, 1:])
    assert kept.timesteps.tolist() == [[0, 0, 1], [4, 5, 6], [2, 3, 4]]
    with pytest.raises(ConfigError, match="windows of 4 steps"):
        convert(batch, num_steps=5)


def test_garbage_is_zero_where_padded_and_refused_where_valid():
    batch = make_windows()
    batch.proprio[0, 0] = np.nan
    assert not convert(batch).states[0, :2].any()
    batch.proprio[2, 3] = np.nan
    with pytest.raises(DataError, match=r"'proprio' of windows \[2\]"):
        convert(batch)


def test_a_chunk_begins_with_the_newest_step_and_goes_on_with_the_future():
    batch = make_windows()
    alone = convert(batch)
    assert np.array_equal(alone.target_chunks, alone.target_actions[:, -1:])
    assert alone.chunk_mask.all()
    rng = np.random.default_rng(1)
    future = rng.uniform(-1, 1, (3, 5, 2)).astype(np.float32)
    future[1, 2:] = np.nan
    future_mask = np.ones((3, 5), bool)
    future_mask[1, 2:] = False
    chunked = convert(replace(batch, future_target_actions=future, future_mask=future_mask), horizon=4)
    np.testing.assert_allclose(chunked.target_chunks[:, 0], batch.target_actions[:, -1], atol=1e-6)
    np.testing.assert_allclose(chunked.target_chunks[0, 1:], future[0, :3], atol=1e-6)
    assert chunked.chunk_mask.tolist() == [[True] * 4, [True, True, True, False], [True] * 4]
    assert not chunked.target_chunks[1, 3].any()
    with pytest.raises(ConfigError, match=r"0 steps after each window.*horizon is 4.*future_steps to 3"):
        convert(batch, horizon=4)
    with pytest.raises(ConfigError, match="5 steps after"):
        convert(replace(batch, future_target_actions=future, future_mask=future_mask), horizon=7)


def test_what_else_is_known_of_a_window_comes_along():
    batch = make_windows()
    plain = convert(batch)
    assert (plain.instructions, plain.tasks) == (("a", "b", "c"), ("a", "b", "c"))
    assert plain.success.tolist() == [True, True, False]
    assert plain.weights is None
    assert not plain.interventions.any()
    interventions = np.ones((3, 4), bool)
    known = replace(batch, interventions=interventions, weights=np.array([1, 0.5, 0.25], np.float32))
    told = convert(known, num_steps=3, instructions=["x", "y", "z"])
    assert told.instructions == ("x", "y", "z")
    assert told.weights.tolist() == [1, 0.5, 0.25]
    assert told.interventions.tolist() == [[False, True, True], [True] * 3, [True] * 3]
    moved = told.to("cpu")
    assert moved.instructions == told.instructions
    assert moved.weights is not None


def test_action_codec_is_its_own_inverse_within_bounds():
    action = (Dimension(name="x", low=0, high=4), Dimension(name="y", low=-10, high=-2))
    codec = ActionCodec.of(replace(SPEC, action=action))
    raw = np.array([[0, -10], [4, -2], [1, -6]], np.float32)
    np.testing.assert_allclose(codec.encode(raw), [[-1, -1], [1, 1], [-0.5, 0]], atol=1e-6)
    np.testing.assert_allclose(codec.decode(codec.encode(raw)), raw, atol=1e-5)
    np.testing.assert_allclose(codec.decode(np.array([[7.0, -7.0]])), [[4, -10]])
    np.testing.assert_allclose(codec.encode(np.array([[9.0, -99.0]])), [[1, -1]])


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "hindsight"},
        {"kind": "reward", "scale": 0.0},
        {"kind": "steps_to_success", "target": 5.0},
        {"kind": "reward", "target": float("nan")},
    ],
)
def test_conditioning_that_cannot_work_is_refused(settings):
    with pytest.raises(ConfigError):
        ReturnConditioning(**settings)


def test_goal_table_embeds_each_new_text_once_and_keeps_a_bounded_number():
    asked = []

    def embed(texts):
        asked.append(list(texts))
        return np.array([[len(text)] for text in texts], np.float32)

    table = GoalTable(embed, capacity=2)
    table.remember(["a", "bb", "a"])
    table.remember(["ccc"])
    assert asked == [["a", "bb"]]
    assert table.lookup(["bb", "ccc", "a", "ccc"]).ravel().tolist() == [2, 3, 1, 3]
    assert asked[1:] == [["ccc"]]
    texts, vectors = table.contents()
    assert texts == ("a", "bb")
    assert table.with_rows(texts, vectors).lookup(["bb"]).tolist() == [[2]]
    with pytest.raises(DataError):
        GoalTable(embed, instructions=["a"], embeddings=np.zeros((2, 1)))
