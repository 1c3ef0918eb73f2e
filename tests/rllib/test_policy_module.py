"""A policy behind RLlib's interface acts as it does on a robot."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

from vla_dist.core.errors import ConfigError, ContractMismatch, NotFound
from vla_dist.core.types import Observation
from vla_dist.data.formats.episode import join_segments
from vla_dist.envs.gymnasium_env import spec_of
from vla_dist.models.auto import build_policy, make_artifact
from vla_dist.models.chunking import OpenLoop, RealTimeChunks, TemporalEnsemble
from vla_dist.models.conditioning import ReturnConditioning
from vla_dist.models.goals import GoalTable
from vla_dist.models.zoo import architecture
from vla_dist.registry.comparison import write_files
from vla_dist.replay.table import RedisReplayTable
from vla_dist.rllib.episode_stream import stream_episodes
from vla_dist.rllib.policy_module import PREVIOUS_REWARDS, SETTINGS, PolicyModule, with_policy
from vla_dist.rllib.policy_source import PolicySource
from vla_dist.rllib.spaces import action_space, observation_space
from vla_dist.rllib.state_columns import StateColumns
from vla_dist.testing.fakes import make_spec

SPEC = make_spec(proprio_dim=4, action_dim=2, max_episode_steps=20)
_ROWS = 3


def _artifact(member, spec=SPEC, conditioning=None, **changes):
    torch.manual_seed(0)
    entry = architecture(member)
    changes.setdefault("goal_dim", 0)
    model = entry.model(entry.configure("tiny", spec, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    goals = GoalTable(_not_embedded, instructions=[""], embeddings=np.ones((1, changes["goal_dim"]), np.float32))
    return make_artifact(model, name="p", spec=spec, conditioning=conditioning or ReturnConditioning(), goals=goals)


def _not_embedded(texts):
    raise AssertionError(f"{texts} are not among the goals")


def _module(artifact, folder, **settings):
    write_files(artifact, folder)
    own = {
        "source": PolicySource(folder=str(folder)).to_dict(),
        "instruction": "",
        "target_return": None,
        "normalises": True,
        **settings,
    }
    spec = artifact.manifest.spec
    return RLModuleSpec(
        module_class=PolicyModule,
        observation_space=observation_space(spec),
        action_space=action_space(spec),
        inference_only=True,
        model_config={SETTINGS: own, "max_seq_len": 20},
    ).build()


_REWARDING = ReturnConditioning(kind="reward", scale=10.0, target=8.0)
_CASES = {
    "state alone": ("decision_transformer", SPEC, None, {}),
    "returns and actions": (
        "decision_transformer",
        SPEC,
        _REWARDING,
        {"use_returns": True, "use_previous_actions": True, "context_steps": 4},
    ),
    "memory": ("memory", SPEC, None, {}),
}


@pytest.mark.parametrize("case", _CASES)
def test_it_acts_as_the_policy_does(case, tmp_path):
    member, spec, conditioning, changes = _CASES[case]
    artifact = _artifact(member, spec, conditioning, **changes)
    module, policy = _module(artifact, tmp_path / "policy"), build_policy(artifact)
    rng = np.random.default_rng(1)
    states = [policy.initial_state() for _ in range(_ROWS)]
    first = module.get_initial_state()
    columns = {name: torch.stack([value] * _ROWS) for name, value in first.items()}
    for step in range(9):
        proprio = rng.normal(size=(_ROWS, spec.proprio_dim)).astype(np.float32)
        rewards = rng.normal(size=_ROWS).astype(np.float32) if step else np.zeros(_ROWS, np.float32)
        expected, states = policy.act(
            [Observation(proprio=proprio[row], previous_reward=float(rewards[row])) for row in range(_ROWS)], states
        )
        answer = module.forward_inference(
            {
                Columns.OBS: torch.from_numpy(proprio)[:, None],
                PREVIOUS_REWARDS: torch.from_numpy(rewards)[:, None],
                Columns.STATE_IN: columns,
            }
        )
        columns = answer[Columns.STATE_OUT]
        # make_spec's bounds are -1 and 1: normalised actions are the robot's own.
        np.testing.assert_allclose(answer[Columns.ACTIONS][:, 0].numpy(), np.stack(expected)[:, 0], atol=1e-5)


def test_a_state_comes_back_from_its_columns(tmp_path):
    policy = build_policy(_artifact("decision_transformer", context_steps=3))
    columns = StateColumns(policy)
    state = policy.initial_state()
    for step in range(5):
        packed = columns.pack(state)
        assert {name: value.shape for name, value in packed.items()} == {
            name: value.shape for name, value in columns.pack(policy.initial_state()).items()
        }
        observation = Observation(proprio=np.full(4, step, np.float32))
        (direct,), (after,) = policy.act([observation], [state])
        (again,), _ = policy.act([observation], [columns.unpack(packed)])
        np.testing.assert_allclose(again, direct, atol=1e-5)
        state = after


@pytest.mark.parametrize("rule", ["open loop", "real time"])
def test_chunks_are_executed_to_their_end(rule):
    chunked = build_policy(_artifact("vla", goal_dim=4, horizon=3, context_steps=1))
    policy = OpenLoop(chunked) if rule == "open loop" else RealTimeChunks(chunked, execute_steps=2, delay_steps=1)
    columns, state = StateColumns(policy), policy.initial_state()
    for step in range(7):
        observation = Observation(proprio=np.full(4, 0.1 * step, np.float32))
        (direct,), (after,) = policy.act([observation], [state])
        (again,), _ = policy.act([observation], [columns.unpack(columns.pack(state))])
        np.testing.assert_array_equal(again, direct)
        state = after


def test_a_growing_memory_is_refused():
    chunked = build_policy(_artifact("vla", goal_dim=4, horizon=3, context_steps=1))
    with pytest.raises(ConfigError, match="fixed size"):
        StateColumns(TemporalEnsemble(chunked))


def test_a_policy_told_returns_must_be_told_rewards(tmp_path):
    module = _module(
        _artifact("decision_transformer", SPEC, _REWARDING, use_returns=True, context_steps=3), tmp_path / "policy"
    )
    columns = {name: value[None] for name, value in module.get_initial_state().items()}
    with pytest.raises(ConfigError, match="with_policy"):
        module.forward_inference({Columns.OBS: torch.zeros(1, 1, 4), Columns.STATE_IN: columns})


def test_another_robots_environment_is_refused(tmp_path):
    write_files(_artifact("decision_transformer"), tmp_path / "policy")
    settings = {
        "source": PolicySource(folder=str(tmp_path / "policy")).to_dict(),
        "instruction": "",
        "target_return": None,
        "normalises": True,
    }
    env = gym.make("Pendulum-v1")
    with pytest.raises(ContractMismatch, match=r"observations .* actions"):
        PolicyModule(
            observation_space=env.observation_space,
            action_space=env.action_space,
            model_config={SETTINGS: settings, "max_seq_len": 20},
        )


def test_a_policy_comes_from_one_place(tmp_path):
    with pytest.raises(ConfigError, match="neither"):
        PolicySource()
    with pytest.raises(NotFound, match="registry pull"):
        PolicySource(folder=str(tmp_path)).load()


def _pendulum_policy(folder):
    env = gym.make("Pendulum-v1", max_episode_steps=12)
    spec = spec_of("Pendulum-v1", env)
    conditioning = ReturnConditioning(kind="reward", scale=100.0, target=-50.0)
    artifact = _artifact("decision_transformer", spec, conditioning, use_returns=True, context_steps=4)
    write_files(artifact, folder)
    return build_policy(artifact)


def test_an_env_runner_of_rllib_drives_it_with_its_own_rewards(server, tmp_path):
    """What the runner executed is what the policy does on the recorded observations and rewards."""
    policy = _pendulum_policy(tmp_path / "policy")
    stream = stream_episodes(server.url, buffer="driven", segment_steps=4, spill=str(tmp_path / "spill"))
    config = (
        PPOConfig()
        .environment("Pendulum-v1", env_config={"max_episode_steps": 12})
        .env_runners(num_env_runners=0, num_envs_per_env_runner=2)
        .callbacks(stream)
    )
    with_policy(config, PolicySource(folder=str(tmp_path / "policy")))
    runner = SingleAgentEnvRunner(config=config)
    runner.sample(num_timesteps=40, explore=False)
    runner.stop()
    table = RedisReplayTable.open(server.url, "driven")
    episodes = [join_segments(segments) for segments in table.episodes()]
    table.close()
    assert len(episodes) >= 2
    for episode in episodes:
        state, reward = policy.initial_state(), 0.0
        for step in range(episode.num_steps):
            observation = Observation(proprio=episode.proprio[step], previous_reward=reward)
            (chunk,), (state,) = policy.act([observation], [state])
            np.testing.assert_allclose(chunk[0], episode.actions[step], atol=1e-4)
            reward = float(episode.rewards[step])


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(300)
def test_an_algorithm_evaluates_it(ray_session, tmp_path):
    _pendulum_policy(tmp_path / "policy")
    config = (
        PPOConfig()
        .environment("Pendulum-v1", env_config={"max_episode_steps": 12})
        .env_runners(num_env_runners=0)
        .evaluation(evaluation_duration=5, evaluation_duration_unit="episodes", evaluation_interval=1)
    )
    algorithm = with_policy(config, PolicySource(folder=str(tmp_path / "policy"))).build_algo()
    try:
        result = algorithm.evaluate()
        with pytest.raises(ConfigError, match="does not learn"):
            algorithm.train()
    finally:
        algorithm.stop()
    assert result["env_runners"]["num_episodes"] == 5
    assert -12 * 17 < result["env_runners"]["episode_return_mean"] < 0
