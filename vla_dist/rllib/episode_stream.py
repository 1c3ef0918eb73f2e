"""Every whole episode of any RLlib algorithm into the replay, by one line in its config::

    config.callbacks(stream_episodes("redis://replay:6379"))

RLlib makes one ``EpisodeStream`` in each process of the algorithm; those of env runners open the replay.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO

from vla_dist.core.errors import ConfigError, ContractMismatch, NotFound
from vla_dist.core.recorder import EpisodeRecorder
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Segment
from vla_dist.envs.gymnasium_env import spec_of
from vla_dist.replay.config import BufferConfig
from vla_dist.replay.table import RedisReplayTable
from vla_dist.rllib.outbox import Outbox, OutboxConfig
from vla_dist.rllib.recorded_env import RecordedEnv
from vla_dist.rllib.spill import EpisodeSpill

_METRICS = "replay"


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamConfig:
    """Which episodes go where."""

    redis_url: str
    buffer: str = "rllib"
    """Name of the buffer; it is created where it does not exist."""
    run_id: str = "rllib"
    """Begins the name of each episode; at most 30 ASCII characters."""
    spec: EnvSpec | None = None
    """Contract of the environment; None: read off its spaces, as ``gymnasium:<id>`` would have it."""
    task: str = ""
    """Machine name, and the words, of what the algorithm does; empty: the environment's id."""
    spill: str = ""
    """Folder for what the replay does not take, on each node; empty: ``runs/RUN_ID/spill``."""
    segment_steps: int = 32
    """T of a buffer that is created; one that exists keeps its own."""
    capacity_steps: int = 1_000_000
    """Likewise."""
    records_evaluation: bool = False
    """Whether episodes of RLlib's evaluation go there too."""
    outbox: OutboxConfig = field(default_factory=OutboxConfig)

    def __post_init__(self) -> None:
        if not self.run_id.isascii() or not 1 <= len(self.run_id) <= 30:
            raise ConfigError(f"run_id {self.run_id!r} must be 1 to 30 ASCII characters; it begins each episode's name")


def stream_episodes(redis_url: str, **settings: Any) -> "type[EpisodeStream]":
    """For ``AlgorithmConfig.callbacks``, alone or in a list beside others.

    Args:
        redis_url: of the replay's server, as env runners reach it.
        settings: of ``StreamConfig``.
    """
    spill = str(Path(settings.pop("spill", "") or f"runs/{settings.get('run_id', 'rllib')}/spill").resolve())
    # RLlib says that it wants a class, and takes whatever makes a callback.
    make = partial(EpisodeStream, StreamConfig(redis_url=redis_url, spill=spill, **settings))
    return cast("type[EpisodeStream]", make)


class EpisodeStream(RLlibCallback):
    """When a sample is handed to the algorithm, its finished episodes are in the replay or on disk, each once.

    Results of ``train()`` show ``env_runners/replay``: episodes stored, spilled and refused, and the time waited.
    """

    def __init__(self, config: StreamConfig) -> None:
        super().__init__()
        self.config = config
        self._finished: list[list[Segment]] = []
        self._table: RedisReplayTable | None = None
        self._outbox: Outbox | None = None
        self._version = 0

    def on_environment_created(self, *, env_runner: Any, env: Any, **kwargs: Any) -> None:
        """Raises:
        ConfigError: environments in other processes, several agents, or spaces that no robot has.
        ContractMismatch: the buffer is of another robot.
        Unreachable: no server.
        """
        if env_runner.config.in_evaluation and not self.config.records_evaluation:
            return
        sub_envs = _sub_envs(env, env_runner.config)
        name = getattr(sub_envs[0].spec, "id", None) or type(sub_envs[0].unwrapped).__name__
        spec = self.config.spec or spec_of(name, sub_envs[0])
        num_steps = self._open(spec)
        for index, sub_env in enumerate(sub_envs):
            robot_id = f"rllib-{env_runner.worker_index}-{index}"
            begin = partial(self._begin, spec, num_steps=num_steps, robot_id=robot_id, task=self.config.task or name)
            sub_envs[index] = RecordedEnv(
                sub_env, begin=begin, on_episode=self._finished.append, on_close=self._disconnect
            )

    def on_sample_end(self, *, metrics_logger: Any = None, samples: Sequence[Any], **kwargs: Any) -> None:
        """Errors as ``Outbox.put``."""
        if self._outbox is None:
            return
        # One sample is taken with one version of the weights.
        for episode in samples[:1]:
            if WEIGHTS_SEQ_NO in episode.extra_model_outputs:
                self._version = int(episode.get_extra_model_outputs(WEIGHTS_SEQ_NO, -1))
        finished, self._finished[:] = list(self._finished), []
        before = replace(self._outbox.counts)
        self._outbox.put([[replace(s, policy_version=self._version) for s in episode] for episode in finished])
        if metrics_logger is not None:
            for name in ("stored", "spilled", "refused", "waited_s"):
                change = getattr(self._outbox.counts, name) - getattr(before, name)
                metrics_logger.log_value((_METRICS, name), change, reduce="lifetime_sum")

    def _disconnect(self) -> None:
        """RLlib tells a callback of no end but that of its environments; the table connects again when it is used."""
        if self._table is not None:
            self._table.close()

    def _begin(self, spec: EnvSpec, *, num_steps: int, robot_id: str, task: str) -> EpisodeRecorder:
        return EpisodeRecorder(
            spec,
            num_steps=num_steps,
            episode_id=f"{self.config.run_id}-{uuid.uuid4().hex}",
            robot_id=robot_id,
            task=task,
            instruction=task,
            policy_version=0,
            source="policy",
        )

    def _open(self, spec: EnvSpec) -> int:
        """T of the buffer. Environments may be made anew at any time; the outbox, and what it holds, stays."""
        if self._table is None or self._outbox is None:
            self._table = open_buffer(self.config, spec)
            spill = EpisodeSpill(self.config.spill, self._table.codec, buffer=self.config.buffer)
            self._outbox = Outbox(self._table, spill, self.config.outbox)
        spec.require_match(self._table.spec, mine="environment", theirs="replay")
        return self._table.config.num_steps


def open_buffer(config: StreamConfig, spec: EnvSpec) -> RedisReplayTable:
    """The buffer as it was created, or a new one for this robot. Raises ContractMismatch, Unreachable."""
    try:
        table = RedisReplayTable.open(config.redis_url, config.buffer)
    except NotFound:
        new = BufferConfig(
            name=config.buffer, num_steps=config.segment_steps, capacity_steps=config.capacity_steps, cache_bytes=0
        )
        return RedisReplayTable(config.redis_url, spec, new)
    try:
        spec.require_match(table.spec, mine="environment", theirs="replay")
    except ContractMismatch:
        table.close()
        raise
    return table


def deliver_spilled(config: StreamConfig, *, timeout_s: float) -> int:
    """Bring what an earlier run left on this node's disk into the replay; how many files still wait.

    A run that goes on does this by itself. Raises NotFound where there is no such buffer, Unreachable.
    """
    table = RedisReplayTable.open(config.redis_url, config.buffer)
    try:
        spill = EpisodeSpill(config.spill, table.codec, buffer=config.buffer)
        return Outbox(table, spill, config.outbox).flush(timeout_s=timeout_s)
    finally:
        table.close()


def _sub_envs(env: Any, config: Any) -> list["gym.Env[Any, Any]"]:
    envs = getattr(env, "envs", None)
    if config.is_multi_agent or not isinstance(envs, list) or not envs:
        raise ConfigError(
            f"episodes are recorded at the environments, one robot each, in the env runner's own process; got "
            f"{'several agents' if config.is_multi_agent else type(env).__name__}. Use a single-agent environment and "
            "env_runners(gym_env_vectorize_mode='sync')"
        )
    return envs
