"""Episodes to a Minari data set and back; it stands here because Minari speaks in Gymnasium's spaces.

Source: Minari 0.5, https://minari.farama.org (``create_dataset_from_buffers``, ``EpisodeData``). A Minari episode has
one observation more than actions; what was perceived after the last action was not recorded here, so the last
observation stands there twice.

Dimensions: L steps.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from vla_dist.core.errors import ConfigError, DataError, NotFound, ResourceMissing
from vla_dist.core.specs import CameraSpec, Dimension, EnvSpec
from vla_dist.core.types import Array, Source
from vla_dist.data.formats.episode import Episode

_TEXT = spaces.Text(max_length=256, min_length=0)
_TEXTS = ("episode_id", "robot_id", "task", "instruction", "source")


def write_minari(
    episodes: Iterable[Episode],
    spec: EnvSpec,
    dataset_id: str,
    *,
    on_episode: Callable[[int], None] = lambda _: None,
) -> tuple[int, int]:
    """Write a new data set where Minari keeps them (``MINARI_DATASETS_PATH``); memory holds all of it.

    Returns:
        Episodes and steps.

    Raises:
        ResourceMissing: Minari is not installed.
        ConfigError: a name that Minari does not take, or that is taken.
        DataError: no episode.
    """
    minari = _minari()
    buffers, steps = [], 0
    for number, episode in enumerate(episodes):
        buffers.append(_buffer(minari, number, episode))
        steps += episode.num_steps
        on_episode(number + 1)
    if not buffers:
        raise DataError("there is no episode to export; is the filter too narrow?")
    observation = {"proprio": _box(spec.proprio), "instruction": _TEXT}
    for camera in spec.cameras:
        observation[camera.name] = spaces.Box(0, 255, (camera.height, camera.width, 3), np.uint8)
    try:
        minari.create_dataset_from_buffers(
            dataset_id=dataset_id,
            buffer=buffers,
            observation_space=spaces.Dict(observation),
            action_space=_box(spec.action),
            algorithm_name="vla-dist",
            description=spec.to_json(),
        )
    except (ValueError, OSError) as error:
        raise ConfigError(f"Minari does not take data set {dataset_id!r}: {error}") from error
    return len(buffers), steps


def read_minari(dataset_id: str, *, source: Source = "human") -> tuple[EnvSpec, Callable[[], Iterator[Episode]]]:
    """The contract of a Minari data set on this machine, and its episodes.

    Observations must be a vector, or a dictionary with ``proprio`` (or ``observation``) and pictures.

    Raises:
        ResourceMissing: Minari is not installed.
        NotFound: no such data set here.
        DataError: spaces that have no place in a contract.
    """
    minari = _minari()
    try:
        stored = minari.load_dataset(dataset_id)
    except (FileNotFoundError, ValueError) as error:
        raise NotFound(
            f"Minari has no data set {dataset_id!r} here ({error}); 'minari list local' names them"
        ) from error
    spec = _spec_of(stored, dataset_id)

    def episodes() -> Iterator[Episode]:
        for one in stored.iterate_episodes():
            yield _episode_of(one, spec, dataset_id, source)

    return spec, episodes


def _buffer(minari: Any, number: int, episode: Episode) -> Any:
    observation: dict[str, Any] = {
        "proprio": _with_last(episode.proprio),
        "instruction": [episode.instruction] * (episode.num_steps + 1),
        **{name: _with_last(frames) for name, frames in episode.images.items()},
    }
    ends = np.zeros(episode.num_steps, bool)
    ends[-1] = True
    infos: dict[str, Any] = {
        "success": np.append(False, ends & episode.success),
        "intervention": np.append(False, episode.interventions),
        "target_action": np.concatenate([np.zeros_like(episode.target_actions[:1]), episode.target_actions]),
        **{name: [getattr(episode, name)] * (episode.num_steps + 1) for name in _TEXTS},
    }
    return minari.data_collector.EpisodeBuffer(
        id=number,
        observations=observation,
        actions=episode.actions,
        rewards=episode.rewards.tolist(),
        terminations=(ends & episode.success).tolist(),
        truncations=(ends & (not episode.success)).tolist(),
        infos=infos,
    )


def _episode_of(stored: Any, spec: EnvSpec, dataset_id: str, source: Source) -> Episode:
    observations, infos = stored.observations, stored.infos or {}
    length = len(stored.rewards)
    proprio = observations
    images: dict[str, Array] = {}
    if isinstance(observations, Mapping):
        proprio = observations.get("proprio", observations.get("observation"))
        images = {camera.name: np.asarray(observations[camera.name])[:length] for camera in spec.cameras}
    actions = np.asarray(stored.actions, np.float32).reshape(length, -1)
    targets = infos.get("target_action")
    name = dataset_id.replace("/", "-")[:40]
    texts = {key: _first(infos.get(key)) for key in _TEXTS}
    success = infos.get("success")
    return Episode(
        episode_id=texts["episode_id"] or f"{name}-{stored.id:06d}",
        robot_id=texts["robot_id"] or "minari",
        task=texts["task"] or name,
        instruction=texts["instruction"] or name,
        source=texts["source"] if texts["source"] in ("expert", "policy", "human") else source,  # type: ignore[arg-type]
        policy_version=0,
        success=bool(np.any(success)) if success is not None else bool(stored.terminations[-1]),
        proprio=np.asarray(proprio, np.float32).reshape(length + 1, -1)[:length],
        actions=actions,
        target_actions=actions if targets is None else np.asarray(targets, np.float32)[1:],
        rewards=np.asarray(stored.rewards, np.float32),
        interventions=np.asarray(infos.get("intervention", np.zeros(length + 1)), bool)[1:],
        images=images,
    )


def _spec_of(stored: Any, dataset_id: str) -> EnvSpec:
    description = stored.storage.metadata.get("description") or ""
    if description.startswith('{"') and '"control_hz"' in description:
        return EnvSpec.from_json(description)
    observation, action = stored.observation_space, stored.action_space
    cameras: list[CameraSpec] = []
    vector = observation
    if isinstance(observation, spaces.Dict):
        vector = observation.spaces.get("proprio", observation.spaces.get("observation"))
        for name, space in observation.spaces.items():
            if isinstance(space, spaces.Box) and len(space.shape) == 3 and space.dtype == np.uint8:
                cameras.append(CameraSpec(name=name, height=space.shape[0], width=space.shape[1]))
    if not isinstance(vector, spaces.Box) or len(vector.shape) != 1 or not isinstance(action, spaces.Box):
        raise DataError(f"{dataset_id} observes {observation} and acts by {action}; only flat boxes can be imported")
    return EnvSpec(
        name=f"minari:{dataset_id}",
        proprio=_dimensions("observation", vector),
        action=_dimensions("action", action),
        control_hz=10.0,
        max_episode_steps=max(1, int(stored.total_steps)),
        cameras=tuple(cameras),
    )


def _dimensions(name: str, box: spaces.Box) -> tuple[Dimension, ...]:
    bounds = zip(box.low.reshape(-1).tolist(), box.high.reshape(-1).tolist(), strict=True)
    return tuple(Dimension(name=f"{name}_{i}", low=low, high=high) for i, (low, high) in enumerate(bounds))


def _box(dimensions: tuple[Dimension, ...]) -> spaces.Box:
    low = np.array([d.low for d in dimensions], np.float32)
    high = np.array([d.high for d in dimensions], np.float32)
    return spaces.Box(low, high, dtype=np.float32)


def _with_last(values: Array) -> Array:
    return np.concatenate([values, values[-1:]])


def _first(values: Any) -> str:
    if values is None or not len(values):
        return ""
    first = values[0]
    return first.decode() if isinstance(first, bytes) else str(first)


def _minari() -> Any:
    try:
        import minari  # type: ignore[import-not-found]
        import minari.data_collector  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        raise ResourceMissing(f"Minari needs the package {error.name!r}: pip install 'minari[hdf5]'") from error
    return minari
