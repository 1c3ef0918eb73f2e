"""A teacher of RLlib's fills a replay, which says what it got: ``python examples/rllib_teacher.py``."""

import tempfile
from pathlib import Path

import ray
from ray.rllib.algorithms.ppo import PPOConfig

from vla_dist.replay.server import EmbeddedServer
from vla_dist.replay.table import RedisReplayTable
from vla_dist.rllib.episode_stream import stream_episodes

with tempfile.TemporaryDirectory() as folder, EmbeddedServer(Path(folder) / "redis") as server:
    ray.init(num_cpus=2, include_dashboard=False)
    config = (
        PPOConfig()
        .environment("Pendulum-v1")
        .env_runners(num_env_runners=0, num_envs_per_env_runner=4)
        .training(train_batch_size_per_learner=1000, minibatch_size=250, num_epochs=4)
        .callbacks(stream_episodes(server.url, buffer="pendulum", spill=f"{folder}/spill"))
    )
    algorithm = config.build_algo()
    for _ in range(3):
        algorithm.train()
    algorithm.stop()
    ray.shutdown()
    table = RedisReplayTable.open(server.url, "pendulum")
    print(f"{table.stats().num_episodes} episodes, {table.stats().num_steps} steps")
    table.close()
