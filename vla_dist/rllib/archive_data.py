"""RLlib's offline algorithms on the fleet's archive, without a copy of it::

    config = train_from_archive(BCConfig(), "s3://bucket/episodes", where=EpisodeFilter(success=True))
    algorithm = config.build_algo()
    algorithm.train()
    module = learnt_module(algorithm)
    stop_training(algorithm)

What travels through Ray's data pipeline is where each episode lies; the episodes are read where they are mapped to
batches, with the checks of any other reading.
"""

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.rl_module.rl_module import RLModule
from ray.rllib.offline.offline_data import OfflineData
from ray.rllib.offline.offline_prelearner import OfflinePreLearner

from vla_dist.core.errors import ConfigError
from vla_dist.core.specs import EnvSpec
from vla_dist.replay.archive.parquet import EVERYTHING, EpisodeFilter
from vla_dist.rllib.archived_episodes import (
    ActionColumn,
    EpisodeConversion,
    EpisodeReference,
    list_episodes,
    read_references,
)
from vla_dist.rllib.spaces import action_space, observation_space

C = TypeVar("C", bound=AlgorithmConfig)


def train_from_archive(
    config: C,
    archive: str,
    *,
    where: EpisodeFilter = EVERYTHING,
    actions: ActionColumn = "executed",
    episodes_per_read: int = 32,
    shuffle_steps: int = 10_000,
    seed: int = 0,
) -> C:
    """Give an offline algorithm (BC, MARWIL, CQL, IQL) the archive as its data; the config is changed and returned.

    Its spaces are those of the archive's contract unless it has an environment or spaces of its own.

    Args:
        config: of the algorithm; call this last.
        archive: a path that all nodes share, or a URI; see ``ArchiveFolder.at``.
        where: which episodes.
        actions: to learn.
        episodes_per_read: episodes in memory at once while they are mapped to batches.
        shuffle_steps: steps from which each batch is drawn at random; neighbours of an episode are alike.
        seed: of that drawing, and of the order of the episodes.

    Raises:
        ConfigError: settings that cannot work.
        NotFound, ContractMismatch, IntegrityError, Unreachable: see ``list_episodes``.
    """
    if episodes_per_read < 1 or shuffle_steps < 0:
        raise ConfigError(
            f"episodes_per_read {episodes_per_read} must be at least 1, shuffle_steps {shuffle_steps} at least 0"
        )
    # Processes on this machine may have other working directories.
    place = archive if "://" in archive else str(Path(archive).resolve())
    spec, references = list_episodes(place, where=where)
    order = np.random.default_rng(seed).permutation(len(references))
    settings = {"spec": spec.to_json(), "actions": actions, "episodes_per_read": episodes_per_read}
    config.offline_data(
        # Text, because RLlib takes a config with a list of anything else for an online one; from_items calls the
        # column "item".
        input_=cast(Any, [references[at].to_json() for at in order]),
        input_read_method="from_items",
        offline_data_class=ArchiveData,
        prelearner_class=ArchivePreLearner,
        input_config={"archive": json.dumps(settings)},
        # A learner in this process must be told how many updates train() makes.
        dataset_num_iters_per_learner=config.dataset_num_iters_per_learner or (None if config.num_learners else 1),
        map_batches_kwargs={"concurrency": 1, **(config.map_batches_kwargs or {})},
        iter_batches_kwargs={
            **({"local_shuffle_buffer_size": shuffle_steps, "local_shuffle_seed": seed} if shuffle_steps else {}),
            **(config.iter_batches_kwargs or {}),
        },
    )
    if config.env is None and config.observation_space is None:
        config.environment(observation_space=observation_space(spec), action_space=action_space(spec))
    return config


def learnt_module(algorithm: Algorithm) -> RLModule:
    """Of an algorithm without an environment: its own ``get_module`` asks env runners, and it has none."""
    group = algorithm.learner_group
    assert group is not None
    answers = group.foreach_learner(_own_module)
    return cast(RLModule, next(iter(answers)).get())


def stop_training(algorithm: Algorithm) -> None:
    """End an algorithm that learnt from an archive, while Ray runs.

    Its own ``stop`` leaves the reading of the data open. It is closed through Ray when the process ends, after Ray did,
    and then starts another Ray and waits for ever.
    """
    data = algorithm.offline_data
    if isinstance(data, ArchiveData):
        data.close()
    algorithm.stop()


def _own_module(learner: Any, given: Any = None) -> RLModule:
    return learner.module[DEFAULT_MODULE_ID].unwrapped()


class ArchiveData(OfflineData):
    """Rows are references to episodes, read ``episodes_per_read`` at a time."""

    def __init__(self, config: AlgorithmConfig) -> None:
        super().__init__(config)
        self.data_read_batch_size = _settings(config)["episodes_per_read"]

    def close(self) -> None:
        """End what is being read."""
        reading, self.batch_iterators = self.batch_iterators, None
        if isinstance(reading, Generator):
            reading.close()


class ArchivePreLearner(OfflinePreLearner):
    """Reads the referenced episodes and lets the algorithm's own learner pipeline do the rest."""

    def __init__(self, *, config: AlgorithmConfig, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        settings = _settings(config)
        self._conversion = EpisodeConversion(
            EnvSpec.from_json(settings["spec"]), actions=settings["actions"], normalises=bool(config.normalize_actions)
        )

    def _map_to_episodes(self, batch: dict[str, Any], to_numpy: bool = False, **kwargs: Any) -> dict[str, Any]:
        episodes = read_references([EpisodeReference.from_json(str(text)) for text in batch["item"]])
        return {"episodes": [self._conversion.to_rllib(episode) for episode in episodes]}


def _settings(config: AlgorithmConfig) -> dict[str, Any]:
    return json.loads(config.input_config["archive"])
