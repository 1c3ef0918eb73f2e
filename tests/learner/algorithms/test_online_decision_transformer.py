import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from vla_dist.core.errors import ConfigError
from vla_dist.learner.algorithms.catalogue import make_algorithm
from vla_dist.learner.parallel import OneRank
from vla_dist.learner.train_step import OptimiserConfig, TrainStep
from vla_dist.models.conditioning import ReturnConditioning
from vla_dist.testing.windows import make_train_batch

from .conftest import make_model


def make(*changes, **model):
    model = make_model(head="gaussian", **model)
    algorithm = make_algorithm(
        "online_decision_transformer", changes, model=model.config, conditioning="steps_to_success"
    )
    return model, algorithm


def noisy_actions(model, seed):
    """Actions around 0.3 whose spread of 0.1 is worth about -0.9 nats."""
    batch = make_train_batch(model.config, num_windows=16, seed=seed)
    noise = torch.randn(batch.target_actions.shape, generator=torch.Generator().manual_seed(seed))
    return replace(batch, target_actions=0.3 + 0.1 * noise)


def entropies(model, algorithm):
    step = TrainStep(model, OptimiserConfig(total_updates=10_000, learning_rate=1e-2), algorithm=algorithm)
    return [float(step(noisy_actions(model, update), update)["entropy"]) for update in range(320)]


@pytest.mark.parametrize("target", [-0.2, -0.5])
def test_the_entropy_reaches_its_target_above_that_of_the_data(target):
    model, algorithm = make(f"target_entropy={target}", action_dropout=0.0)
    assert np.mean(entropies(model, algorithm)[-80:]) == pytest.approx(target, abs=0.12)


def test_without_a_target_the_entropy_is_that_of_the_data():
    assert np.mean(entropies(make_model(head="gaussian", action_dropout=0.0), None)[-80:]) < -0.7


def test_the_temperature_rises_below_the_wanted_entropy_and_falls_above_it():
    for raw, sign in ((-1.0, -1.0), (0.4, 1.0)):
        model, algorithm = make()
        with torch.no_grad():
            model.head.weight.zero_()
            model.head.bias.copy_(torch.tensor([0.0, raw]))
        algorithm.loss(model, make_train_batch(model.config))[0].backward()
        assert algorithm.log_temperature.grad.sign() == sign


def test_padding_has_no_part_in_loss_entropy_or_temperature():
    model, algorithm = make()
    model.eval()
    batch = make_train_batch(model.config, num_windows=6)
    pads = ~batch.padding_mask
    assert pads.any()
    other = replace(
        batch,
        states=torch.where(pads[..., None], 7.0, batch.states),
        target_actions=torch.where(pads[..., None], -0.9, batch.target_actions),
    )
    gradients = []
    for one in (batch, other):
        algorithm.zero_grad()
        loss, metrics = algorithm.loss(model, one)
        loss.backward()
        gradients.append((loss.detach(), metrics["entropy"], algorithm.log_temperature.grad.clone()))
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


def policy_windows(model, *, returns, version=3, first_episode=0):
    """Windows that begin with an episode's first step, each of an episode of its own."""
    batch = make_train_batch(model.config, num_windows=len(returns))
    steps = batch.padding_mask.shape[1]
    return replace(
        batch,
        padding_mask=torch.ones_like(batch.padding_mask),
        timesteps=torch.arange(steps).expand(len(returns), -1),
        returns_to_go=torch.tensor(returns)[:, None].expand(-1, steps),
        policy_versions=torch.full((len(returns),), version),
        episodes=torch.arange(len(returns)) + first_episode,
        tasks=("go",) * len(returns),
        instructions=("please go",) * len(returns),
    )


CONDITIONING = ReturnConditioning(kind="steps_to_success", scale=20.0, target=-4.0)


def test_rollouts_ask_for_an_upper_quantile_of_what_the_policy_reached_lately():
    model, algorithm = make("recent_episodes=4", "exploration_quantile=1.0")
    assert algorithm.publishable(CONDITIONING) == CONDITIONING
    algorithm.prepare(policy_windows(model, returns=[-0.9, -0.5]))
    algorithm.prepare(policy_windows(model, returns=[-0.2], version=0, first_episode=50))  # an expert's
    found = algorithm.publishable(CONDITIONING)
    assert found.exploration_targets == pytest.approx({"please go": -10.0, "": -10.0})
    exploring = found.exploring()
    assert exploring.first(0, instruction="please go") == pytest.approx(-10.0)
    assert exploring.first(0, instruction="other words") == pytest.approx(-10.0)
    assert found.first(0, instruction="please go") == -4.0
    # Better episodes come, and the first ones are no longer recent.
    algorithm.prepare(policy_windows(model, returns=[-0.8, -0.7, -0.6, -0.65], first_episode=10))
    assert algorithm.publishable(CONDITIONING).exploration_targets[""] == pytest.approx(-12.0)


def test_what_was_reached_lately_survives_a_checkpoint():
    model, algorithm = make()
    algorithm.prepare(policy_windows(model, returns=[-0.9, -0.5]))
    _, again = make()
    again.load_memory(*algorithm.memory())
    assert again.publishable(CONDITIONING) == algorithm.publishable(CONDITIONING)
    again.updated(OneRank())


@pytest.mark.parametrize(
    ("changes", "model", "conditioning"),
    [
        ([], {"head": "tanh"}, "steps_to_success"),
        ([], {"use_returns": False}, "steps_to_success"),
        ([], {}, "none"),
        (["target_entropy=0.7"], {}, "reward"),
        (["target_entropy=nan"], {}, "reward"),
        (["recent_episodes=0"], {}, "reward"),
        (["exploration_quantile=1.5"], {}, "reward"),
    ],
)
def test_what_it_is_not_for_is_refused(changes, model, conditioning):
    with pytest.raises(ConfigError, match=r"gaussian|below 0\.69|exploration_quantile"):
        make_algorithm(
            "online_decision_transformer",
            changes,
            model=make_model(**{"head": "gaussian", **model}).config,
            conditioning=conditioning,
        )


def test_the_highest_entropy_that_may_be_asked_for_is_that_of_uniform_actions():
    make(f"target_entropy={math.log(2) - 0.01}")
