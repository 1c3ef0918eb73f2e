"""Any of our environments is one of RLlib's."""

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

from vla_dist.core.seeding import is_evaluation_seed
from vla_dist.core.specs import CameraSpec
from vla_dist.data.formats.episode import join_segments
from vla_dist.envs.make import make_env
from vla_dist.replay.table import RedisReplayTable
from vla_dist.rllib.episode_stream import stream_episodes
from vla_dist.rllib.robot_env import RobotGymEnv
from vla_dist.testing.fakes import FakeEnv, make_spec

_TASK = "length-5-30"


def _maze(**settings):
    return RobotGymEnv(make_env("t-maze", tasks=(_TASK,), max_episode_steps=40), task=_TASK, **settings)


class _Seeds(FakeEnv):
    """Notes what it is reset with."""

    def __init__(self, spec):
        super().__init__(spec)
        self.seen = []

    def reset(self, *, seed, task, instruction=None):
        self.seen.append(seed)
        return super().reset(seed=seed, task=task, instruction=instruction)


def test_it_is_what_gymnasium_expects():
    check_env(_maze(), skip_render_check=True)


@pytest.mark.parametrize("is_evaluation", [False, True])
def test_its_seeds_are_of_one_side_and_repeat_when_asked(is_evaluation):
    robots = [_Seeds(make_spec(proprio_dim=3)) for _ in range(3)]
    for robot, seed in zip(robots, (5, 5, None), strict=True):
        env = RobotGymEnv(robot, task="go", seed=seed, is_evaluation=is_evaluation)
        for _ in range(4):
            env.reset()
    assert {is_evaluation_seed(seed) for robot in robots for seed in robot.seen} == {is_evaluation}
    assert robots[0].seen == robots[1].seen
    assert len({*robots[0].seen, *robots[2].seen}) == 8
    env = RobotGymEnv(robots[2], task="go", seed=8, is_evaluation=is_evaluation)
    env.reset(seed=5)
    assert robots[2].seen[-1] == robots[0].seen[0]


def test_frames_stand_beside_the_reading():
    spec = make_spec(proprio_dim=3, cameras=(CameraSpec(name="top", height=8, width=6),))
    env = RobotGymEnv(FakeEnv(spec), task="go")
    observation, info = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert observation["top"].shape == (8, 6, 3)
    assert info["instruction"]
    env.close()


def test_rllib_runs_it_and_its_episodes_carry_their_contract(server, tmp_path):
    contract = _maze().contract
    stream = stream_episodes(server.url, buffer="maze", spec=contract, task=_TASK, spill=str(tmp_path / "spill"))
    config = PPOConfig().environment(lambda _: _maze()).env_runners(num_env_runners=0, num_envs_per_env_runner=2)
    runner = SingleAgentEnvRunner(config=config.callbacks(stream))
    runner.sample(num_timesteps=1000, random_actions=True)  # some 25 episodes: not all on one side by chance
    runner.stop()
    table = RedisReplayTable.open(server.url, "maze")
    episodes = [join_segments(segments) for segments in table.episodes()]
    assert table.spec.digest == contract.digest
    table.close()
    assert len(episodes) >= 2
    assert {episode.task for episode in episodes} == {_TASK}
    assert len({tuple(episode.proprio[0]) for episode in episodes} | {e.num_steps for e in episodes}) > 2
    for episode in episodes:
        np.testing.assert_array_equal(episode.actions.sum(-1), 1.0)
