"""Conditions that are not returns: what training reads, what acting asks for, what rollouts that explore ask for."""

import numpy as np
import pytest
import torch

from vla_dist.core.errors import ConfigError
from vla_dist.models.conditioning import ReturnConditioning
from vla_dist.models.decision_transformer.decision_transformer import DecisionTransformer
from vla_dist.models.decision_transformer.presets import PRESETS
from vla_dist.models.interpretation.episode import EpisodeWindows
from vla_dist.testing.episodes import EpisodeTable, fill
from vla_dist.testing.fakes import make_spec

SPEC = make_spec()
ADVANTAGE = ReturnConditioning(kind="advantage", scale=20.0, target=20.0)


def sample(num=16):
    table = EpisodeTable(SPEC, context_steps=3)
    fill(table, num_episodes=6)
    return table, table.sample(num, timeout_s=1)


def test_success_is_one_or_zero_all_through_an_episode_and_asked_for_without_end():
    _, batch = sample()
    conditioning = ReturnConditioning(kind="success", target=1.0)
    values = conditioning.training_values(batch, max_episode_steps=20)
    np.testing.assert_array_equal(values, np.repeat(batch.success[:, None], 3, 1).astype(np.float32))
    assert set(values.ravel()) == {0.0, 1.0}
    assert conditioning.first(7, instruction="go") == 1.0
    assert conditioning.after(1.0, reward=0.7) == 1.0


def test_advantages_start_from_the_returns_they_are_of():
    _, batch = sample()
    steps = ReturnConditioning(kind="steps_to_success", scale=20.0, target=-1.0)
    of_steps = ADVANTAGE.training_values(batch, max_episode_steps=20)
    np.testing.assert_array_equal(of_steps, steps.training_values(batch, max_episode_steps=20))
    of_rewards = ReturnConditioning(kind="reward_advantage", scale=2.0, target=2.0)
    np.testing.assert_allclose(of_rewards.training_values(batch, max_episode_steps=20), batch.returns_to_go / 2)
    for conditioning in (ADVANTAGE, of_rewards):
        assert conditioning.first(3) / conditioning.scale == 1.0
        assert conditioning.after(conditioning.target, reward=5.0) == conditioning.target


def test_what_an_episode_shows_of_an_advantage_is_what_was_asked_for():
    table, _ = sample()
    model = DecisionTransformer(PRESETS["mini"](SPEC, goal_dim=0, context_steps=3))
    windows = EpisodeWindows(next(iter(table.episodes())), SPEC, model.config, conditioning=ADVANTAGE, goals=None)
    shown = windows.window(1)
    assert shown.returns_to_go.tolist() == [[0.0, 1.0, 1.0]]
    assert torch.equal(shown.padding_mask, torch.tensor([[False, True, True]]))


def test_rollouts_that_explore_ask_for_their_own_targets_and_robots_do_not():
    targets = {"go": -5.0, "stop": -6.0}
    plain = ReturnConditioning(kind="steps_to_success", scale=20.0, target=-4.0, targets=targets)
    assert plain.exploring() == plain
    both = ReturnConditioning(
        kind="steps_to_success", scale=20.0, target=-4.0, targets=targets, exploration_targets={"go": -9.0, "": -8.0}
    )
    assert both.first(0, instruction="go") == -5.0
    exploring = both.exploring()
    assert [exploring.first(0, instruction=words) for words in ("go", "stop", "other")] == [-9.0, -6.0, -8.0]


def test_an_exploration_target_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match="target"):
        ReturnConditioning(kind="reward", target=1.0, exploration_targets={"": float("nan")})
