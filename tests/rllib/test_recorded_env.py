"""What is recorded is what the environment was asked and gave."""

import gymnasium as gym
import numpy as np
import pytest

from vla_dist.core.errors import ConfigError
from vla_dist.core.recorder import EpisodeRecorder
from vla_dist.data.formats.episode import join_segments
from vla_dist.envs.gymnasium_env import spec_of
from vla_dist.rllib.recorded_env import RecordedEnv


def _record(env_id, steps):
    env = gym.make(env_id, max_episode_steps=steps)
    spec = spec_of(env_id, env)
    whole = []
    numbers = iter(range(100))

    def begin():
        return EpisodeRecorder(
            spec,
            num_steps=4,
            episode_id=f"e{next(numbers)}",
            robot_id="r",
            task="t",
            instruction="t",
            policy_version=0,
            source="policy",
        )

    return RecordedEnv(env, begin=begin, on_episode=whole.append, on_close=lambda: None), whole


def test_observations_actions_and_rewards_are_the_environments_own():
    env, whole = _record("Pendulum-v1", 10)
    rng = np.random.default_rng(0)
    seen, done, rewards = [], [], []
    observation, _ = env.reset(seed=3)
    for _ in range(10):
        action = rng.uniform(-2, 2, 1).astype(np.float32)
        seen.append(observation)
        done.append(action)
        observation, reward, _, truncated, _ = env.step(action)
        rewards.append(reward)
    assert truncated
    (segments,) = whole
    episode = join_segments(segments)
    np.testing.assert_array_equal(episode.proprio, np.array(seen))
    np.testing.assert_array_equal(episode.actions, np.array(done))
    np.testing.assert_allclose(episode.rewards, rewards, rtol=1e-6)
    env.close()


def test_an_episode_that_a_reset_ended_is_told_to_nobody():
    env, whole = _record("Pendulum-v1", 10)
    env.reset(seed=0)
    for _ in range(7):
        env.step(np.zeros(1, np.float32))
    env.reset(seed=1)
    for _ in range(10):
        env.step(np.zeros(1, np.float32))
    assert [join_segments(segments).episode_id for segments in whole] == ["e1"]
    env.close()


def test_choices_are_one_hot():
    env, whole = _record("CartPole-v1", 6)
    env.reset(seed=0)
    for action in (0, 1, 1, 0, 1, 0):
        env.step(action)
    episode = join_segments(whole[0])
    np.testing.assert_array_equal(episode.actions.argmax(-1), [0, 1, 1, 0, 1, 0])
    np.testing.assert_array_equal(episode.actions.sum(-1), 1.0)
    env.close()


def test_an_environment_without_an_end_is_refused():
    env = gym.make("Pendulum-v1").unwrapped
    with pytest.raises(ConfigError, match="max_episode_steps"):
        spec_of("Pendulum-v1", env)
