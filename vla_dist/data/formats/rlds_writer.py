"""Episodes in the shape of RLDS: a TensorFlow data set of episodes whose steps are a nested data set.

Source: Ramos et al. 2021, "RLDS: an Ecosystem to Generate, Share and Use Datasets in Reinforcement Learning"
(https://arxiv.org/abs/2111.02767), and https://github.com/google-research/rlds: ``is_first``, ``is_last``,
``is_terminal``, ``observation``, ``action``, ``reward``, ``discount``; and ``language_instruction`` of Open
X-Embodiment.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vla_dist.core.errors import ConfigError, DataError, ResourceMissing
from vla_dist.core.specs import EnvSpec
from vla_dist.data.formats.episode import Episode

_NAME = "episodes"


def write_rlds(
    episodes: Iterable[Episode], spec: EnvSpec, root: Path, *, on_episode: Callable[[int], None] = lambda _: None
) -> tuple[int, int]:
    """Write a data set that ``tensorflow_datasets.builder_from_directory`` reads.

    Returns:
        Episodes and steps.

    Raises:
        ResourceMissing: tensorflow-datasets is not installed.
        ConfigError: the folder holds something.
        DataError: no episode.
    """
    if root.exists() and any(root.iterdir()):
        raise ConfigError(f"{root} is not empty; give another folder")
    datasets = _tensorflow_datasets()
    counts = {"episodes": 0, "steps": 0}

    def examples() -> Iterator[tuple[int, dict[str, Any]]]:
        for number, episode in enumerate(episodes):
            counts["episodes"] += 1
            counts["steps"] += episode.num_steps
            on_episode(counts["episodes"])
            yield number, _example(episode)

    _store(datasets, _features(datasets, spec), examples, root, spec)
    shutil.rmtree(root / "downloads", ignore_errors=True)  # the library makes it, empty: nothing was downloaded
    if not counts["episodes"]:
        raise DataError("there is no episode to export; is the filter too narrow?")
    return counts["episodes"], counts["steps"]


def _features(datasets: Any, spec: EnvSpec) -> Any:
    kinds = datasets.features
    observation: dict[str, Any] = {"state": kinds.Tensor(shape=(spec.proprio_dim,), dtype=np.float32)}
    for camera in spec.cameras:
        observation[camera.name] = kinds.Image(shape=(camera.height, camera.width, 3), encoding_format="png")
    return kinds.FeaturesDict(
        {
            "steps": kinds.Dataset(
                {
                    "observation": kinds.FeaturesDict(observation),
                    "action": kinds.Tensor(shape=(spec.action_dim,), dtype=np.float32),
                    "target_action": kinds.Tensor(shape=(spec.action_dim,), dtype=np.float32),
                    "reward": kinds.Scalar(dtype=np.float32),
                    "discount": kinds.Scalar(dtype=np.float32),
                    "is_first": kinds.Scalar(dtype=np.bool_),
                    "is_last": kinds.Scalar(dtype=np.bool_),
                    "is_terminal": kinds.Scalar(dtype=np.bool_),
                    "is_intervention": kinds.Scalar(dtype=np.bool_),
                    "language_instruction": kinds.Text(),
                }
            ),
            "episode_metadata": kinds.FeaturesDict(
                {
                    "episode_id": kinds.Text(),
                    "robot_id": kinds.Text(),
                    "task": kinds.Text(),
                    "source": kinds.Text(),
                    "success": kinds.Scalar(dtype=np.bool_),
                }
            ),
        }
    )


def _example(episode: Episode) -> dict[str, Any]:
    last = episode.num_steps - 1
    steps = [
        {
            "observation": {
                "state": episode.proprio[step],
                **{name: frames[step] for name, frames in episode.images.items()},
            },
            "action": episode.actions[step],
            "target_action": episode.target_actions[step],
            "reward": float(episode.rewards[step]),
            "discount": 1.0,
            "is_first": step == 0,
            "is_last": step == last,
            # The task ended by itself; otherwise time was over.
            "is_terminal": step == last and episode.success,
            "is_intervention": bool(episode.interventions[step]),
            "language_instruction": episode.instruction,
        }
        for step in range(episode.num_steps)
    ]
    names = ("episode_id", "robot_id", "task", "source", "success")
    return {"steps": steps, "episode_metadata": {name: getattr(episode, name) for name in names}}


def _store(datasets: Any, features: Any, examples: Callable[[], Iterator[Any]], root: Path, spec: EnvSpec) -> None:
    class Episodes(datasets.core.GeneratorBasedBuilder):
        VERSION = datasets.core.Version("1.0.0")
        name = _NAME

        def _info(self) -> Any:
            return datasets.core.DatasetInfo(builder=self, features=features, description=spec.to_json())

        def _split_generators(self, dl_manager: Any) -> Any:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[Any]:
            return examples()

    Episodes(data_dir=str(root)).download_and_prepare()


def _tensorflow_datasets() -> Any:
    try:
        import tensorflow_datasets  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        raise ResourceMissing(
            f"RLDS needs the package {error.name!r}: pip install tensorflow-cpu tensorflow-datasets importlib-resources"
        ) from error
    return tensorflow_datasets
