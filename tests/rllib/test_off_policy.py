"""Estimates from recorded episodes against values that are known exactly."""

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from ray.rllib.algorithms.bc.bc_catalog import BCCatalog
from ray.rllib.algorithms.bc.torch.default_bc_torch_rl_module import DefaultBCTorchRLModule
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from torch.distributions import Categorical, Independent, Normal

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.core.specs import Dimension, EnvSpec
from vla_dist.data.formats.episode import Episode
from vla_dist.rllib.off_policy import TargetPolicy, estimate_value, evaluation_batch, module_distribution
from vla_dist.run.data_sets import write_archive
from vla_dist.testing.fakes import make_spec

# A walk over four places, two choices, four steps; the rest of an observation says which step it is.
_PLACES, _STEPS = 4, 4
_DISCOUNT = 0.9
_REWARDS = np.array([[0.0, 1.0], [2.0, -1.0], [0.5, 0.0], [-1.0, 3.0]])
_SUCCESSOR = np.array([[1, 2], [3, 0], [3, 1], [0, 2]])
_SLIP = 0.2
"""Chance of landing on the next place in order instead."""
SPEC = EnvSpec(
    name="walk",
    proprio=tuple(Dimension(name=f"x{i}") for i in range(_PLACES + _STEPS)),
    action=tuple(Dimension(name=f"choice_{i}", low=0.0, high=1.0) for i in range(2)),
    control_hz=1.0,
    max_episode_steps=50,
    action_kind="discrete",
)
_BEHAVIOUR = np.array([[0.5, 0.5], [0.6, 0.4], [0.4, 0.6], [0.5, 0.5]])
_GOOD = np.array([[0.7, 0.3], [0.8, 0.2], [0.7, 0.3], [0.15, 0.85]])
_BAD = np.array([[0.6, 0.4], [0.25, 0.75], [0.3, 0.7], [0.8, 0.2]])


def _policy(table):
    probabilities = torch.tensor(table, dtype=torch.float32)
    return lambda observations: Categorical(probs=probabilities[observations[:, :_PLACES].argmax(-1)])


def _true_value(table):
    """By backward induction."""
    value = np.zeros(_PLACES)
    for _ in range(_STEPS):
        moved = (1 - _SLIP) * value[_SUCCESSOR] + _SLIP * value[(np.arange(_PLACES) + 1) % _PLACES][:, None]
        value = (table * (_REWARDS + _DISCOUNT * moved)).sum(-1)
    return value[0]


def _episode(number, rng):
    place, rows, actions, rewards = 0, [], [], []
    for step in range(_STEPS):
        action = int(rng.random() < _BEHAVIOUR[place, 1])
        rows.append(np.concatenate([np.eye(_PLACES)[place], np.eye(_STEPS)[step]]))
        actions.append(np.eye(2)[action])
        rewards.append(_REWARDS[place, action])
        place = (place + 1) % _PLACES if rng.random() < _SLIP else _SUCCESSOR[place, action]
    return Episode(
        episode_id=f"walk-{number}",
        robot_id="r",
        task="walk",
        instruction="walk",
        source="policy",
        policy_version=1,
        success=False,
        proprio=np.array(rows, np.float32),
        actions=np.array(actions, np.float32),
        target_actions=np.array(actions, np.float32),
        rewards=np.array(rewards, np.float32),
        interventions=np.zeros(_STEPS, bool),
    )


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("walks") / "archive")
    rng = np.random.default_rng(5)
    write_archive((_episode(number, rng) for number in range(600)), SPEC, folder, segment_steps=3)
    spec, batch = evaluation_batch(folder, behaviour=_policy(_BEHAVIOUR))
    assert spec.digest == SPEC.digest
    return batch


def test_the_two_policies_differ_by_more_than_the_estimates_may_err():
    assert _true_value(_GOOD) - _true_value(_BAD) > 2.0


@pytest.mark.parametrize("table", [_GOOD, _BAD], ids=["good", "bad"])
@pytest.mark.parametrize("method", ["is", "wis", pytest.param("dr", marks=pytest.mark.slow)])
def test_an_estimate_is_within_four_standard_errors_of_the_truth(batch, method, table):
    settings = {"fit_iterations": 60} if method == "dr" else {}
    found = estimate_value(method, batch, TargetPolicy(SPEC, _policy(table)), discount=_DISCOUNT, **settings)
    assert found.num_episodes == 600
    assert found.target_error < 0.35
    assert abs(found.target - _true_value(table)) < 4 * found.target_error
    assert abs(found.behaviour - _true_value(_BEHAVIOUR)) < 0.35


@pytest.mark.parametrize("table", [_GOOD, _BAD], ids=["good", "bad"])
def test_a_fitted_q_function_comes_near_the_truth(batch, table):
    found = estimate_value("dm", batch, TargetPolicy(SPEC, _policy(table)), discount=_DISCOUNT, fit_iterations=150)
    assert abs(found.target - _true_value(table)) < 0.4


def test_asking_about_the_recorded_policy_gives_what_it_earned(batch):
    found = estimate_value("is", batch, TargetPolicy(SPEC, _policy(_BEHAVIOUR)), discount=_DISCOUNT)
    assert found.target == pytest.approx(found.behaviour, rel=1e-5)


def test_a_policy_that_cannot_have_recorded_them_is_refused(tmp_path):
    archive = str(tmp_path / "archive")
    write_archive([_episode(number, np.random.default_rng(number)) for number in range(5)], SPEC, archive)
    never = np.tile([1.0, 0.0], (_PLACES, 1))
    with pytest.raises(DataError, match="not the policy that recorded"):
        evaluation_batch(archive, behaviour=_policy(never))


@pytest.mark.parametrize("space", [Discrete(3), Box(-1.0, 1.0, (2,))], ids=["choices", "continuous"])
def test_a_module_answers_the_likelihoods_that_rllib_would(space):
    torch.manual_seed(0)
    module = RLModuleSpec(
        module_class=DefaultBCTorchRLModule,
        observation_space=Box(-1.0, 1.0, (4,)),
        action_space=space,
        model_config={"fcnet_hiddens": [8]},
        catalog_class=BCCatalog,
    ).build()
    observations = torch.randn(6, 4)
    inputs = module.forward_inference({Columns.OBS: observations})[Columns.ACTION_DIST_INPUTS]
    theirs = module.get_inference_action_dist_cls().from_logits(inputs)
    ours = module_distribution(module)(observations)
    actions = ours.sample()
    assert ours.log_prob(actions).shape == (6,)
    torch.testing.assert_close(ours.log_prob(actions), theirs.logp(actions))


def test_continuous_actions_are_weighed_but_have_no_fitted_q(tmp_path):
    spec = make_spec(proprio_dim=1, action_dim=1, max_episode_steps=9)
    rng = np.random.default_rng(0)

    def bandit(number):
        action = rng.normal(0.0, 0.5, (1, 1)).clip(-1, 1).astype(np.float32)
        return Episode(
            episode_id=f"b{number}",
            robot_id="r",
            task="go",
            instruction="go",
            source="policy",
            policy_version=1,
            success=False,
            proprio=np.zeros((1, 1), np.float32),
            actions=action,
            target_actions=action,
            rewards=action[0],
            interventions=np.zeros(1, bool),
        )

    archive = str(tmp_path / "archive")
    write_archive((bandit(number) for number in range(800)), spec, archive)

    def gaussian(mean):
        return lambda observations: Independent(Normal(torch.full((len(observations), 1), mean), 0.5), 1)

    _, batch = evaluation_batch(archive, behaviour=gaussian(0.0))
    target = TargetPolicy(spec, gaussian(0.2))
    found = estimate_value("wis", batch, target)
    assert abs(found.target - 0.2) < 0.06, "the mean of the target's actions, up to what clipping takes"
    with pytest.raises(ConfigError, match="use is or wis"):
        estimate_value("dm", batch, target)
    with pytest.raises(ConfigError, match="method"):
        estimate_value("best", batch, target)  # pyright: ignore[reportArgumentType]
