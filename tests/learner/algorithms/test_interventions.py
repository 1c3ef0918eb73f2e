from dataclasses import replace

import numpy as np
import pytest

from vla_dist.core.errors import ConfigError
from vla_dist.learner.algorithms.interventions import InterventionWeights, intervention_weights
from vla_dist.testing.episodes import EpisodeTable

from .conftest import SPEC, first_action, make_model, record

T, TAKEOVER, F = 12, 8, 3


def corrected_episodes(*, num=10, num_corrected=2):
    """The policy always goes the wrong way, -0.8; persons take over in some episodes and go 0.8 from equal states."""
    table = EpisodeTable(SPEC, context_steps=2, future_steps=F)
    for number in range(num):
        taken = (np.arange(T) >= TAKEOVER) & (number < num_corrected)
        record(table, np.zeros((T, 2)), np.where(taken, 0.8, -0.8)[:, None], version=1, interventions=taken)
    return table


def weights_by_kind(batch, config):
    weights, valid = intervention_weights(batch, config), batch.padding_mask
    corrected = batch.interventions & valid
    return weights, valid, corrected


def test_corrections_have_their_share_of_every_batch_that_holds_some():
    table = corrected_episodes()
    seen = 0
    for _ in range(10):
        weights, valid, corrected = weights_by_kind(table.sample(64, timeout_s=1), InterventionWeights(before_steps=F))
        assert weights[valid].mean() == pytest.approx(1.0, abs=1e-5)
        if corrected.sum() >= 4:
            seen += 1
            assert weights[corrected].sum() / weights[valid].sum() == pytest.approx(0.5, abs=1e-5)
    assert seen > 5


def test_a_single_corrected_step_is_not_all_of_the_gradient():
    batch = corrected_episodes(num_corrected=0).sample(64, timeout_s=1)
    batch.interventions[3, -1] = True
    weights = intervention_weights(batch, InterventionWeights(before_steps=F))
    assert weights[3, -1] == 20.0
    assert weights[batch.padding_mask].mean() == pytest.approx(1.0, abs=1e-5)


def test_steps_before_a_takeover_are_left_out_also_where_it_comes_after_the_window():
    table = corrected_episodes(num=1, num_corrected=1)
    batch = table.sample(200, timeout_s=1)
    weights, valid, _ = weights_by_kind(batch, InterventionWeights(before_steps=F))
    before = valid & (batch.timesteps >= TAKEOVER - F) & (batch.timesteps < TAKEOVER)
    newest_is_before = before[:, -1] & ~batch.interventions.any(1)
    assert newest_is_before.any()
    np.testing.assert_array_equal(weights[valid] == 0, before[valid])
    half = intervention_weights(batch, InterventionWeights(before_steps=F, before_weight=0.5))
    assert half[before].min() > 0
    earlier = valid & (batch.timesteps < TAKEOVER - F)
    assert half[before][0] == pytest.approx(0.5 * half[earlier][0])


def test_what_a_person_shows_in_a_demonstration_is_no_correction():
    batch = replace(corrected_episodes().sample(16, timeout_s=1), sources=("human",) * 16)
    weights = intervention_weights(batch, InterventionWeights(before_steps=F))
    assert (weights == 1).all()


def test_a_replay_that_does_not_show_what_follows_is_refused():
    table = EpisodeTable(SPEC, context_steps=2)
    record(table, np.zeros((T, 2)), np.zeros((T, 1)), version=1)
    with pytest.raises(ConfigError, match="shows 0 steps after each window but before_steps is 3"):
        intervention_weights(table.sample(4, timeout_s=1), InterventionWeights(before_steps=F))


@pytest.mark.parametrize("settings", [{"share": 0.0}, {"share": 1.0}, {"before_steps": -1}, {"before_weight": 1.5}])
def test_impossible_weights_are_refused(settings):
    with pytest.raises(ConfigError, match="intervention share"):
        InterventionWeights(**settings)


def test_the_policy_prefers_the_corrected_action_that_it_seldom_saw(train):
    """Corrections are 8 % of all steps and contradict the rest in the same state: 0.9 of the weight turns the mean."""
    model = {"use_returns": False, "use_previous_actions": False}
    learnt = {"updates": 60, "learning_rate": 1e-2}
    _, cloned = train(corrected_episodes(), make_model(**model), **learnt)
    weights = InterventionWeights(share=0.9, before_steps=F)
    _, corrected = train(corrected_episodes(), make_model(**model), interventions=weights, **learnt)
    assert first_action(cloned, [0, 0])[0] < -0.5
    assert first_action(corrected, [0, 0])[0] > 0.4
