"""One line in a config, and the replay has each episode of the algorithm once, as it really was."""

import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import redis
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.sac import SACConfig
from ray.rllib.connectors.env_to_module import MeanStdFilter
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

from vla_dist.core.errors import ConfigError, ContractMismatch, Unreachable
from vla_dist.data.formats.episode import join_segments
from vla_dist.replay.table import RedisReplayTable
from vla_dist.rllib.episode_stream import StreamConfig, deliver_spilled, stream_episodes
from vla_dist.rllib.spill import EpisodeSpill
from vla_dist.testing.fakes import make_spec

_STEPS = 10


@pytest.fixture
def make_stream(server, tmp_path):
    def make(name, **settings):
        settings = {"buffer": name, "run_id": name, "segment_steps": 4, "capacity_steps": 5000, **settings}
        return stream_episodes(server.url, spill=str(tmp_path / "spill"), **settings)

    return make


@pytest.fixture
def episodes_of(server):
    def read(name):
        table = RedisReplayTable.open(server.url, name)
        try:
            return [join_segments(segments) for segments in table.episodes()]
        finally:
            table.close()

    return read


def _pendulum(stream, **env_runners):
    config = PPOConfig().environment("Pendulum-v1", env_config={"max_episode_steps": _STEPS}).callbacks(stream)
    return config.env_runners(num_env_runners=0, num_envs_per_env_runner=2, **env_runners)


@pytest.fixture
def make_runner():
    """An env runner of RLlib's own, in this process and without a cluster."""
    running = []

    def make(config):
        running.append(SingleAgentEnvRunner(config=config))
        return running[-1]

    yield make
    for runner in running:
        runner.stop()


def test_samples_that_cut_episodes_anywhere_leave_each_whole_one_in_the_replay_once(
    make_stream, make_runner, episodes_of
):
    runner = make_runner(_pendulum(make_stream("fragments")))
    ended = 0
    for _ in range(9):
        ended += sum(chunk.is_done for chunk in runner.sample(num_timesteps=7))
    episodes = episodes_of("fragments")
    assert len(episodes) == ended > 4
    assert len({episode.episode_id for episode in episodes}) == ended
    for episode in episodes:
        assert episode.num_steps == _STEPS
        assert (episode.task, episode.source) == ("Pendulum-v1", "policy")
        assert np.abs(np.linalg.norm(episode.proprio[:, :2], axis=1) - 1).max() < 1e-5


def test_a_filter_of_observations_does_not_reach_the_replay(make_stream, make_runner, episodes_of):
    config = _pendulum(make_stream("filtered"), env_to_module_connector=lambda env, spaces, device: MeanStdFilter())
    samples = make_runner(config).sample(num_episodes=2)
    filtered = np.concatenate([chunk.get_observations() for chunk in samples])
    assert np.abs(np.linalg.norm(filtered[:, :2], axis=1) - 1).max() > 0.1, "RLlib's own episodes are filtered"
    for episode in episodes_of("filtered"):
        assert np.abs(np.linalg.norm(episode.proprio[:, :2], axis=1) - 1).max() < 1e-5


@pytest.mark.parametrize("random_actions", [False, True])
def test_actions_are_those_the_environment_executed(make_stream, make_runner, episodes_of, random_actions):
    name = f"executed-{random_actions}"
    runner = make_runner(_pendulum(make_stream(name)))
    runner.sample(num_episodes=2, random_actions=random_actions)
    checked = 0
    for episode in episodes_of(name):
        # The physics says which torque was applied; Source: gymnasium's pendulum.py.
        cos, sin, speed = episode.proprio[:-1].T
        torque = (episode.proprio[1:, 2] - speed - 0.05 * 15.0 * sin) / (0.05 * 3.0)
        is_free = np.abs(episode.proprio[1:, 2]) < 7.9
        np.testing.assert_allclose(torque[is_free], episode.actions[:-1, 0][is_free], atol=1e-3)
        assert np.abs(cos).max() <= 1
        checked += is_free.sum()
    assert checked > 5


def test_episodes_of_an_evaluation_stay_out_unless_asked_for(make_stream, make_runner, server, episodes_of):
    config = _pendulum(make_stream("quiet"))
    config.in_evaluation = True
    make_runner(config).sample(num_episodes=1)
    with redis.Redis.from_url(server.url) as client:
        assert not list(client.scan_iter("*quiet*"))
    config = _pendulum(make_stream("loud", records_evaluation=True))
    config.in_evaluation = True
    make_runner(config).sample(num_episodes=1)
    assert episodes_of("loud")


def test_the_result_says_what_became_of_the_episodes(make_stream, make_runner):
    runner = make_runner(_pendulum(make_stream("counted")))
    for _ in range(3):
        runner.sample(num_episodes=2)
    assert runner.metrics.peek(("replay", "stored")) == 6
    assert runner.metrics.peek(("replay", "spilled")) == 0


def test_environments_in_other_processes_are_refused(make_stream):
    config = _pendulum(make_stream("async"), gym_env_vectorize_mode="async")
    with pytest.raises(ConfigError, match="sync"):
        SingleAgentEnvRunner(config=config)


def test_the_buffer_of_another_robot_is_refused(make_stream, make_runner):
    make_runner(_pendulum(make_stream("pendulum"))).sample(num_episodes=1)
    stream = make_stream("pendulum", spec=make_spec(proprio_dim=3))
    with pytest.raises(ContractMismatch, match="control_hz"):
        make_runner(_pendulum(stream))


@pytest.mark.slow
def test_a_replay_that_is_not_there_is_an_error_before_anything_is_collected(tmp_path):
    stream = stream_episodes(f"unix://{tmp_path}/nobody.sock", spill=str(tmp_path / "spill"))
    with pytest.raises(Unreachable):
        SingleAgentEnvRunner(config=_pendulum(stream))


def test_a_name_that_is_too_long_is_refused():
    with pytest.raises(ConfigError, match="run_id"):
        StreamConfig(redis_url="unix:///nowhere", run_id="x" * 40)


def test_what_an_ended_run_left_on_disk_is_delivered(server, make_stream, make_runner, make_episode, tmp_path):
    make_runner(_pendulum(make_stream("late"))).sample(num_episodes=1)
    table = RedisReplayTable.open(server.url, "late")
    before = table.stats().num_episodes
    (segments, *_) = table.episodes()
    spill = EpisodeSpill(tmp_path / "spill", table.codec, buffer="late")
    spill.put([[replace(segment, episode_id="left-behind") for segment in segments]])
    config = StreamConfig(redis_url=server.url, buffer="late", spill=str(tmp_path / "spill"))
    assert deliver_spilled(config, timeout_s=5.0) == 0
    assert table.stats().num_episodes == before + 1
    assert table.has_episode("left-behind")
    table.close()


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(400)
def test_sac_on_two_env_runners_of_which_one_is_killed(ray_session, make_stream, episodes_of):
    config = (
        SACConfig()
        .environment("Pendulum-v1", env_config={"max_episode_steps": _STEPS})
        .env_runners(num_env_runners=2, num_envs_per_env_runner=2, rollout_fragment_length=15)
        .fault_tolerance(restart_failed_env_runners=True)
        .training(train_batch_size_per_learner=64, num_steps_sampled_before_learning_starts=100)
        .callbacks(make_stream("sac"))
    )
    algorithm = config.build_algo()
    group = algorithm.env_runner_group
    assert group is not None
    try:
        for _ in range(6):
            algorithm.train()
        pids = group.foreach_env_runner(lambda runner: os.getpid(), local_env_runner=False)
        os.kill(pids[0], signal.SIGKILL)
        deadline = time.monotonic() + 120
        while group.num_healthy_remote_workers() < 2 and time.monotonic() < deadline:
            algorithm.train()
        for _ in range(6):
            result = algorithm.train()
    finally:
        algorithm.stop()
    episodes = episodes_of("sac")
    assert len({episode.episode_id for episode in episodes}) == len(episodes) > 20
    assert all(episode.num_steps == _STEPS for episode in episodes)
    assert max(episode.policy_version for episode in episodes) > 1
    assert result["env_runners"]["replay"]["stored"] > 0
