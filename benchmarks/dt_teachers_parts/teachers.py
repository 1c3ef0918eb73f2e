"""A teacher of RLlib's on a locomotion task; what it does at three levels streams into the replay."""

import contextlib
import json
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.connectors.env_to_module import MeanStdFilter

from vla_dist.core.types import Segment
from vla_dist.replay.table import RedisReplayTable
from vla_dist.rllib.episode_stream import stream_episodes
from vla_dist.run.files import write_atomically
from vla_dist.run.study_parts import Say

LEVELS = ("random", "medium", "expert")
_BUFFER = "teacher"
_STEPS_PER_UPDATE = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherProtocol:
    """Fixed before the first run."""

    environment: str
    max_episode_steps: int
    medium_steps: int
    """Environment steps of training after which the teacher is medium."""
    expert_steps: int
    """And expert."""
    steps_per_level: int
    """Recorded with the weights frozen; actions are drawn, as in training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Taught:
    """Which episodes of the teacher's buffer are of which level, by the order in which they became whole."""

    slices: dict[str, tuple[int, int]]
    episodes_of_training: int

    def episodes(self, redis_url: str) -> dict[str, list[list[Segment]]]:
        """Level -> its episodes."""
        with contextlib.closing(RedisReplayTable.open(redis_url, _BUFFER)) as table:
            return {level: list(islice(table.episodes(), *ends)) for level, ends in self.slices.items()}


def teach(protocol: TeacherProtocol, redis_url: str, folder: Path, *, seed: int, say: Say) -> Taught:
    """Train PPO beside the replay; every episode, of training too, is in the replay when this returns.

    Called again, it finds in the folder that it is done, or begins anew.
    """
    done = folder / "taught.json"
    if not done.exists():
        write_atomically(done, json.dumps(asdict(_teach(protocol, redis_url, folder, seed, say))))
    return Taught(**json.loads(done.read_text()))


def _teach(protocol: TeacherProtocol, redis_url: str, folder: Path, seed: int, say: Say) -> Taught:
    config = (
        PPOConfig()
        .environment(protocol.environment, env_config={"max_episode_steps": protocol.max_episode_steps})
        # The filter changes what the teacher sees, not what is recorded.
        .env_runners(num_env_runners=0, num_envs_per_env_runner=8, env_to_module_connector=_normaliser)
        .training(
            lr=7e-4,
            gamma=0.99,
            lambda_=0.95,
            train_batch_size_per_learner=_STEPS_PER_UPDATE,
            minibatch_size=128,
            num_epochs=10,
            clip_param=0.2,
            use_kl_loss=False,
            vf_clip_param=1e4,
            grad_clip=0.5,
        )
        .rl_module(model_config={"fcnet_hiddens": [64, 64], "fcnet_activation": "tanh", "vf_share_layers": False})
        .debugging(seed=seed)
        .callbacks(stream_episodes(redis_url, buffer=_BUFFER, run_id="teacher", spill=str(folder / "spill")))
    )
    slices: dict[str, tuple[int, int]] = {}
    algorithm = config.build_algo()
    runner = algorithm.env_runner
    assert runner is not None
    with contextlib.closing(RedisReplayTable.open(redis_url, _BUFFER)) as table:
        begun, trained = table.stats().num_episodes, 0
        try:
            for level, until in zip(LEVELS, (0, protocol.medium_steps, protocol.expert_steps), strict=True):
                while trained < until:
                    earned = algorithm.train()["env_runners"].get("episode_return_mean", float("nan"))
                    trained += _STEPS_PER_UPDATE
                    say(f"teacher: {trained} of {protocol.expert_steps} steps, return {earned:.0f}")
                first = table.stats().num_episodes
                # Reset first, so that no episode began under earlier weights.
                runner.sample(
                    num_timesteps=protocol.steps_per_level,
                    random_actions=level == "random",
                    explore=True,
                    force_reset=True,
                )
                slices[level] = (first, table.stats().num_episodes)
        finally:
            algorithm.stop()
        recorded = sum(end - first for first, end in slices.values())
        return Taught(slices=slices, episodes_of_training=table.stats().num_episodes - begun - recorded)


def _normaliser(*given: object, **named: object) -> MeanStdFilter:
    return MeanStdFilter()
