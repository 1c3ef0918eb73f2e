"""A policy that RLlib trains on: it starts as the policy, learns, and comes back as a version."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from vla_dist.core.errors import ConfigError
from vla_dist.core.types import Observation
from vla_dist.envs.gymnasium_env import spec_of
from vla_dist.models.auto import build_policy, make_artifact
from vla_dist.models.conditioning import ReturnConditioning
from vla_dist.models.zoo import architecture
from vla_dist.registry.comparison import write_files
from vla_dist.rllib.policy_module import SETTINGS, with_policy
from vla_dist.rllib.policy_source import PolicySource
from vla_dist.rllib.spaces import action_space, observation_space
from vla_dist.rllib.tunable_module import TunableModule
from vla_dist.testing.fakes import make_spec

SPEC = make_spec(proprio_dim=4, action_dim=2)


def _artifact(spec=SPEC, preset="tiny", **changes):
    torch.manual_seed(0)
    member = architecture("decision_transformer")
    model = member.model(member.configure(preset, spec, goal_dim=0, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return make_artifact(model, name="p", spec=spec, conditioning=ReturnConditioning())


def _module(artifact, folder):
    write_files(artifact, folder)
    settings = {
        "source": PolicySource(folder=str(folder)).to_dict(),
        "instruction": "",
        "target_return": None,
        "normalises": True,
    }
    spec = artifact.manifest.spec
    module = RLModuleSpec(
        module_class=TunableModule,
        observation_space=observation_space(spec),
        action_space=action_space(spec),
        model_config={SETTINGS: settings, "max_seq_len": 20},
    ).build()
    assert isinstance(module, TunableModule)
    return module


@pytest.mark.parametrize("context_steps", [1, 4])
@pytest.mark.parametrize("position", ["window", "timestep"])
def test_its_mean_is_what_the_policy_does_step_by_step_and_in_one_sequence(tmp_path, context_steps, position):
    artifact = _artifact(context_steps=context_steps, position=position)
    module, policy = _module(artifact, tmp_path / "policy"), build_policy(artifact)
    readings = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    state, expected = policy.initial_state(), []
    for reading in readings:
        (chunk,), (state,) = policy.act([Observation(proprio=reading)], [state])
        expected.append(chunk[0])
    columns = {name: value[None] for name, value in module.get_initial_state().items()}
    whole = module.forward_train({Columns.OBS: torch.from_numpy(readings)[None], Columns.STATE_IN: columns})
    np.testing.assert_allclose(
        whole[Columns.ACTION_DIST_INPUTS][0, :, :2].detach().numpy(), np.array(expected), atol=1e-5
    )
    for step, reading in enumerate(readings):
        answer = module.forward_inference(
            {Columns.OBS: torch.from_numpy(reading)[None, None], Columns.STATE_IN: columns}
        )
        columns = answer[Columns.STATE_OUT]
        mean = answer[Columns.ACTION_DIST_INPUTS][0, 0, :2].numpy()
        np.testing.assert_allclose(mean, expected[step], atol=1e-5)


def test_every_parameter_of_what_acts_gets_a_gradient(tmp_path):
    module = _module(_artifact(context_steps=3), tmp_path / "policy")
    columns = {name: torch.stack([value] * 2) for name, value in module.get_initial_state().items()}
    batch = {Columns.OBS: torch.randn(2, 5, 4), Columns.STATE_IN: columns}
    outputs = module.forward_train(batch)[Columns.ACTION_DIST_INPUTS]
    (outputs.square().sum() + module.compute_values(batch).square().sum()).backward()
    without = [name for name, value in module.named_parameters() if value.grad is None or not value.grad.abs().sum()]
    assert not without


def test_what_it_became_is_a_version_that_acts_the_same(tmp_path):
    module = _module(_artifact(context_steps=2), tmp_path / "policy")
    with torch.no_grad():
        module.model.head.bias.add_(0.3)
    tuned = build_policy(module.to_artifact(metrics={"return": 1.0}))
    reading = np.ones(4, np.float32)
    columns = {name: value[None] for name, value in module.get_initial_state().items()}
    mean = module.forward_inference({Columns.OBS: torch.ones(1, 1, 4), Columns.STATE_IN: columns})
    (chunk,), _ = tuned.act([Observation(proprio=reading)], [tuned.initial_state()])
    np.testing.assert_allclose(mean[Columns.ACTION_DIST_INPUTS][0, 0, :2].numpy(), chunk[0], atol=1e-5)


def test_what_cannot_be_tuned_is_refused_with_every_reason(tmp_path):
    artifact = _artifact(preset="small", head="gaussian")
    with pytest.raises(ConfigError, match=r"return or action tokens.*gaussian"):
        _module(artifact, tmp_path / "policy")


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(500)
def test_ppo_makes_it_better(ray_session, tmp_path):
    env = gym.make("CartPole-v1", max_episode_steps=100)
    artifact = _artifact(spec_of("CartPole-v1", env), context_steps=2)
    write_files(artifact, tmp_path / "policy")
    config = (
        PPOConfig()
        .environment("CartPole-v1", env_config={"max_episode_steps": 100})
        .env_runners(num_env_runners=0, num_envs_per_env_runner=4)
        .training(lr=1e-3, train_batch_size_per_learner=1000, minibatch_size=200, num_epochs=6)
        .debugging(seed=0)
    )
    source = PolicySource(folder=str(tmp_path / "policy"))
    algorithm = with_policy(config, source, module_class=TunableModule).build_algo()
    try:
        returns = [algorithm.train()["env_runners"]["episode_return_mean"] for _ in range(12)]
        module = algorithm.get_module()
        assert module is not None
        tuned = module.unwrapped()
        assert isinstance(tuned, TunableModule)
        assert tuned.to_artifact().manifest.parent == 0
    finally:
        algorithm.stop()
    assert max(returns[-3:]) > 2 * returns[0], returns
