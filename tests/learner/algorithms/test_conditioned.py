import numpy as np
import pytest
import torch

from vla_dist.core.errors import ConfigError
from vla_dist.learner.algorithms.catalogue import make_algorithm
from vla_dist.models.value_head import ReturnDistribution
from vla_dist.testing.episodes import EpisodeTable
from vla_dist.testing.windows import make_train_batch

from .conftest import SPEC, first_action, make_model, record

MODEL = {"use_previous_actions": False, "context_steps": 1}


def mixed_episodes(*, num=60):
    """One step each. The right action is 0.8 times the sign of the first reading; a coin decides whether it is taken.

    Being right earns 1 more; the second reading, which nobody chose, is worth 3 times that.
    """
    rng = np.random.default_rng(0)
    table = EpisodeTable(SPEC, context_steps=1)
    for _ in range(num):
        state = rng.choice([-1.0, 1.0], 2)
        is_right = rng.random() < 0.5
        action = 0.8 * state[0] * (1 if is_right else -1)
        rewards = [float(is_right) + 1.5 * state[1]]
        record(table, state[None], [[action]], rewards=rewards, success=is_right, version=1)
    return table


STATES = [(-1, -1), (-1, 1), (1, -1), (1, 1)]


def mean_rightness(policy):
    """0.8 where all actions are right, -0.8 where all are wrong."""
    return np.mean([first_action(policy, state)[0] * state[0] for state in STATES])


@pytest.mark.parametrize("conditioning", ["success", "advantage"])
def test_asked_for_what_went_well_it_does_what_cloning_of_the_same_data_cannot(train, conditioning):
    changes = () if conditioning == "success" else ("quantiles=[0.5]",)
    _, policy = train(
        mixed_episodes(),
        make_model(**MODEL),
        conditioning=conditioning,
        algorithm_changes=changes,
        updates=120,
        learning_rate=1e-2,
    )
    assert mean_rightness(policy) > 0.6


def test_cloning_of_mixed_data_is_at_chance(train):
    _, policy = train(mixed_episodes(), make_model(**MODEL, use_returns=False), updates=120, learning_rate=1e-2)
    assert abs(mean_rightness(policy)) < 0.3


def test_an_advantage_is_not_misled_by_luck_as_a_return_is(train):
    """The best returns all come from lucky states: where the state is unlucky, nothing says how to earn them."""
    learnt = {
        "algorithm_changes": ("quantiles=[0.5]",),
        "conditioning": "reward_advantage",
        "updates": 120,
        "learning_rate": 1e-2,
    }
    metrics, policy = train(mixed_episodes(), make_model(**MODEL), **learnt)
    unlucky = [first_action(policy, state)[0] * state[0] for state in STATES if state[1] < 0]
    assert min(unlucky) > 0.6
    assert metrics["good_share"] == pytest.approx(0.5, abs=0.15)


def test_corrections_count_as_good_whatever_followed():
    model = make_model(**MODEL)
    algorithm = make_algorithm("conditioned", model=model.config, conditioning="advantage").eval()
    mask = torch.ones(2, 2, dtype=torch.bool)
    interventions = torch.tensor([[True, False], [False, False]])
    condition = algorithm._condition(torch.tensor([[-5.0, 1.0], [-1.0, -1.0]]), mask, interventions)
    assert condition.tolist() == [[1.0, 1.0], [-1.0, -1.0]]


def test_the_value_head_expects_the_mean_return_of_a_state():
    """Half of the time 0, half of the time -1: a mean of -0.5, and a distribution of two peaks."""
    torch.manual_seed(0)
    value = ReturnDistribution(state_dim=1, goal_dim=0, low=-1.0, high=0.0, num_bins=21, width=16)
    optimiser = torch.optim.Adam(value.parameters(), 1e-2)
    states = torch.tensor([[0.0], [0.0], [1.0]])
    returns = torch.tensor([0.0, -1.0, -0.25])
    for _ in range(150):
        loss = value.surprise(value(states, None, {}), returns).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    logits = value(states, None, {})
    torch.testing.assert_close(value.expected(logits), torch.tensor([-0.5, -0.5, -0.25]), atol=0.03, rtol=0)
    two_peaks = logits[0].softmax(-1)
    assert two_peaks[:3].sum() > 0.4
    assert two_peaks[-3:].sum() > 0.4


def test_the_policy_gets_no_gradient_of_the_value_nor_the_value_of_the_policy():
    model = make_model()
    algorithm = make_algorithm("conditioned", model=model.config, conditioning="advantage")
    batch = make_train_batch(model.config, num_windows=6)
    with_value, _ = algorithm.loss(model, batch)
    with_value.backward()
    of_value = [p.grad.clone() for p in algorithm.value.parameters()]
    algorithm.zero_grad()
    logits = algorithm.value(batch.states, None, {})
    surprise = algorithm.value.surprise(logits, batch.returns_to_go)[batch.padding_mask].mean()
    surprise.backward()
    for before, parameter in zip(of_value, algorithm.value.parameters(), strict=True):
        torch.testing.assert_close(before, parameter.grad)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["quantiles=[0.7, 0.3]"], "must increase"),
        (["quantiles=[]"], "must increase"),
        (["threshold_rate=0"], "threshold_rate 0"),
        (["bins=3"], "no setting 'bins'"),
        (["value_width=wide"], "value_width must be a whole number"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_algorithm("conditioned", changes, model=make_model().config, conditioning="advantage")


def test_a_model_that_reads_no_returns_is_refused():
    with pytest.raises(ConfigError, match="use_returns=true"):
        make_algorithm("conditioned", model=make_model(use_returns=False).config, conditioning="success")
