"""Where everything lies in a LeRobot data set, version 3.0.

Source: huggingface/lerobot 0.4, ``lerobot/datasets/utils.py`` and ``lerobot_dataset.py``.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vla_dist.core.errors import DataError, NotFound
from vla_dist.core.specs import CameraSpec, Dimension, EnvSpec

VERSION = "v3.0"
INFO, STATS, TASKS = "meta/info.json", "meta/stats.json", "meta/tasks.parquet"
EPISODES = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEOS = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
CHUNK_FILES = 1000
STATE, ACTION, IMAGES = "observation.state", "action", "observation.images."
TARGET, REWARD, SUCCESS, DONE, TAKEN = "target_action", "next.reward", "next.success", "next.done", "intervention"
INDEX_FEATURES = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
OWN = "vla_dist"
"""Key of info.json, and first part of the names of columns of episodes, that only this package reads."""
OWN_COLUMNS = ("episode_id", "robot_id", "task", "source", "policy_version", "success")


def features_of(spec: EnvSpec) -> dict[str, dict[str, Any]]:
    """The data set's features, in the order of its columns."""
    action_names = [dimension.name for dimension in spec.action]
    features: dict[str, dict[str, Any]] = {
        STATE: _vector([dimension.name for dimension in spec.proprio]),
        ACTION: _vector(action_names),
        TARGET: _vector(action_names),
        REWARD: {"dtype": "float32", "shape": [1], "names": None},
        SUCCESS: {"dtype": "bool", "shape": [1], "names": None},
        DONE: {"dtype": "bool", "shape": [1], "names": None},
        TAKEN: {"dtype": "bool", "shape": [1], "names": None},
    }
    if not spec.proprio:
        del features[STATE]
    for camera in spec.cameras:
        features[f"{IMAGES}{camera.name}"] = {
            "dtype": "video",
            "shape": [camera.height, camera.width, 3],
            "names": ["height", "width", "channels"],
        }
    return features | {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in INDEX_FEATURES.items()}


def load_info(root: Path) -> dict[str, Any]:
    """Raises NotFound, or DataError for another version or damage."""
    path = root / INFO
    try:
        info = json.loads(path.read_text())
    except OSError as error:
        raise NotFound(f"no LeRobot data set at {root}: {INFO} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error})") from error
    version = str(info.get("codebase_version"))
    if not version.startswith("v3."):
        raise DataError(
            f"{path} says codebase_version {version!r}, expected {VERSION}; convert it with lerobot's own "
            "convert_dataset_v21_to_v30"
        )
    missing = sorted({"fps", "features", "total_episodes", "total_frames"} - set(info))
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}")
    return info


def spec_of(info: Mapping[str, Any], *, name: str) -> EnvSpec:
    """The contract: this package's own where it wrote the data set, or else what the features say.

    Raises:
        DataError: no action, or a feature of a kind that has no place in a contract.
    """
    own = info.get(OWN)
    if own is not None:
        return EnvSpec.from_json(own["spec"])
    features = info["features"]
    if ACTION not in features:
        raise DataError(f"the data set has no feature {ACTION!r}; it has {', '.join(features)}")
    cameras = []
    for key, feature in features.items():
        if feature["dtype"] in ("video", "image"):
            height, width = _height_and_width(key, feature)
            cameras.append(CameraSpec(name=key.removeprefix(IMAGES), height=height, width=width))
    longest = int(info.get("total_frames", 1))
    return EnvSpec(
        name=f"lerobot:{info.get('robot_type') or name}",
        proprio=_dimensions(STATE, features[STATE]) if STATE in features else (),
        action=_dimensions(ACTION, features[ACTION]),
        control_hz=float(info["fps"]),
        max_episode_steps=max(1, longest),
        cameras=tuple(cameras),
    )


def _vector(names: list[str]) -> dict[str, Any]:
    return {"dtype": "float32", "shape": [len(names)], "names": names}


def _dimensions(key: str, feature: Mapping[str, Any]) -> tuple[Dimension, ...]:
    if len(feature["shape"]) != 1:
        raise DataError(f"feature {key!r} has shape {feature['shape']}, expected a vector")
    names = feature.get("names")
    if isinstance(names, Mapping):
        names = [one for group in names.values() for one in group]
    if not names or len(names) != feature["shape"][0] or len(set(names)) != len(names):
        names = [f"{key.rpartition('.')[2]}_{number}" for number in range(feature["shape"][0])]
    return tuple(Dimension(name=str(one)) for one in names)


def _height_and_width(key: str, feature: Mapping[str, Any]) -> tuple[int, int]:
    shape, names = list(feature["shape"]), list(feature.get("names") or ["height", "width", "channels"])
    sizes = dict(zip(names, shape, strict=False))
    if len(shape) != 3 or "height" not in sizes or "width" not in sizes:
        raise DataError(f"camera {key!r} has shape {shape} named {names}, expected height, width and channels")
    return int(sizes["height"]), int(sizes["width"])
