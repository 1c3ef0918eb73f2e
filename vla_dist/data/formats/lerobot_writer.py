"""Episodes to a LeRobot data set, version 3.0: Parquet for numbers, MP4 for cameras, statistics and tasks beside them.

Source: huggingface/lerobot 0.4; see ``lerobot_layout``. Nothing of lerobot is needed to write it.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Array
from vla_dist.data.formats import lerobot_layout as layout
from vla_dist.data.formats.episode import Episode
from vla_dist.data.formats.statistics import MergedStatistics, Statistics, image_statistics, vector_statistics
from vla_dist.data.formats.video import VideoEncoding, VideoWriter

_MB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LeRobotConfig:
    """Sizes of files, as in the format's own settings."""

    data_mb: int = 100
    video_mb: int = 200
    video: VideoEncoding = field(default_factory=VideoEncoding)

    def __post_init__(self) -> None:
        if self.data_mb < 1 or self.video_mb < 1:
            raise ConfigError(f"data_mb {self.data_mb} and video_mb {self.video_mb} must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedSet:
    """What was written."""

    episodes: int
    steps: int
    tasks: int
    """Different instructions."""


def write_lerobot(
    episodes: Iterable[Episode],
    spec: EnvSpec,
    root: Path,
    *,
    config: LeRobotConfig | None = None,
    on_episode: Callable[[int], None] = lambda _: None,
) -> ExportedSet:
    """Write a data set into an empty or missing folder. Memory holds one episode.

    Raises:
        ConfigError: the folder holds something.
        DataError: no episode, or one that does not fit the spec.
    """
    if root.exists() and any(root.iterdir()):
        raise ConfigError(f"{root} is not empty; give another folder")
    writer = _Writer(spec, root, config or LeRobotConfig())
    try:
        for episode in episodes:
            writer.add(episode)
            on_episode(writer.num_episodes)
    finally:
        writer.close()
    return writer.finish()


class _File:
    """A running number of files, so many to a chunk."""

    def __init__(self) -> None:
        self.number = 0

    @property
    def place(self) -> dict[str, int]:
        return {"chunk_index": self.number // layout.CHUNK_FILES, "file_index": self.number % layout.CHUNK_FILES}


class _Writer:
    def __init__(self, spec: EnvSpec, root: Path, config: LeRobotConfig) -> None:
        self._spec = spec
        self._root = root
        self._config = config
        self._features = layout.features_of(spec)
        self._schema = _schema(self._features)
        self._data_file = _File()
        self._data: pq.ParquetWriter | None = None
        self._data_bytes = 0
        self._videos: dict[str, VideoWriter] = {}
        self._video_files = {f"{layout.IMAGES}{camera.name}": _File() for camera in spec.cameras}
        self._tasks: dict[str, int] = {}
        self._rows: list[dict[str, Any]] = []
        self._merged = {name: MergedStatistics() for name in self._features}
        self._num_steps = 0

    @property
    def num_episodes(self) -> int:
        return len(self._rows)

    def add(self, episode: Episode) -> None:
        self._require_fit(episode)
        columns = self._columns(episode)
        row = self._data_row(episode, columns)
        statistics: dict[str, Statistics] = {
            name: vector_statistics(values.reshape(len(values), -1)) for name, values in columns.items()
        }
        for camera in self._spec.cameras:
            key, frames = f"{layout.IMAGES}{camera.name}", episode.images[camera.name]
            row |= self._add_video(key, frames)
            statistics[key] = image_statistics(frames)
        for name, values in statistics.items():
            self._merged[name].add(values)
            row |= {f"stats/{name}/{kind}": value.tolist() for kind, value in values.items()}
        row |= {f"meta/episodes/{name}": 0 for name in ("chunk_index", "file_index")}
        row |= {f"{layout.OWN}/{name}": getattr(episode, name) for name in layout.OWN_COLUMNS}
        self._rows.append(row)
        self._num_steps += episode.num_steps

    def close(self) -> None:
        if self._data is not None:
            self._data.close()
        for video in self._videos.values():
            video.close()

    def finish(self) -> ExportedSet:
        """The meta data, which makes it a data set."""
        if not self._rows:
            raise DataError("there is no episode to export; is the filter too narrow?")
        meta = self._root / "meta"
        (self._root / layout.EPISODES.format(chunk_index=0, file_index=0)).parent.mkdir(parents=True)
        table = pa.Table.from_pylist(self._rows)
        pq.write_table(table, self._root / layout.EPISODES.format(chunk_index=0, file_index=0))
        # The words are the index of the frame, not a column: so they are read.
        frame = pd.DataFrame({"task_index": list(self._tasks.values())}, index=list(self._tasks))
        frame.to_parquet(self._root / layout.TASKS)
        statistics = {name: merged.result() for name, merged in self._merged.items()}
        (self._root / layout.STATS).write_text(json.dumps(statistics, indent=4))
        info = {
            "codebase_version": layout.VERSION,
            "robot_type": self._spec.name,
            "total_episodes": len(self._rows),
            "total_frames": self._num_steps,
            "total_tasks": len(self._tasks),
            "chunks_size": layout.CHUNK_FILES,
            "data_files_size_in_mb": self._config.data_mb,
            "video_files_size_in_mb": self._config.video_mb,
            "fps": _number(self._spec.control_hz),
            "splits": {"train": f"0:{len(self._rows)}"},
            "data_path": layout.DATA,
            "video_path": layout.VIDEOS if self._spec.cameras else None,
            "features": self._described_features(),
            layout.OWN: {"spec": self._spec.to_json()},
        }
        (meta / "info.json").write_text(json.dumps(info, indent=4))
        return ExportedSet(episodes=len(self._rows), steps=self._num_steps, tasks=len(self._tasks))

    def _columns(self, episode: Episode) -> dict[str, Array]:
        """Everything but frames, as numbers of one row for each step."""
        length = episode.num_steps
        ends = np.zeros(length, bool)
        ends[-1] = True
        task = self._tasks.setdefault(episode.instruction or episode.task, len(self._tasks))
        columns: dict[str, Array] = {
            layout.STATE: episode.proprio,
            layout.ACTION: episode.actions,
            layout.TARGET: episode.target_actions,
            layout.REWARD: episode.rewards,
            layout.SUCCESS: ends & episode.success,
            layout.DONE: ends,
            layout.TAKEN: episode.interventions,
            "timestamp": (np.arange(length) / self._spec.control_hz).astype(np.float32),
            "frame_index": np.arange(length),
            "episode_index": np.full(length, self.num_episodes),
            "index": self._num_steps + np.arange(length),
            "task_index": np.full(length, task),
        }
        return {name: column for name, column in columns.items() if name in self._features}

    def _data_row(self, episode: Episode, columns: dict[str, Array]) -> dict[str, Any]:
        if self._data_bytes >= self._config.data_mb * _MB and self._data is not None:
            self._data.close()
            self._data, self._data_bytes = None, 0
            self._data_file.number += 1
        if self._data is None:
            path = self._root / layout.DATA.format(**self._data_file.place)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._data = pq.ParquetWriter(path, self._schema, compression="snappy")
        arrays = [_column(columns[one.name], one.type) for one in self._schema]
        table = pa.Table.from_arrays(arrays, schema=self._schema)
        self._data.write_table(table)
        self._data_bytes += table.nbytes
        return {
            "episode_index": self.num_episodes,
            "tasks": [episode.instruction or episode.task],
            "length": episode.num_steps,
            **{f"data/{name}": value for name, value in self._data_file.place.items()},
            "dataset_from_index": self._num_steps,
            "dataset_to_index": self._num_steps + episode.num_steps,
        }

    def _add_video(self, key: str, frames: Array) -> dict[str, Any]:
        file, fps = self._video_files[key], self._spec.control_hz
        video = self._videos.get(key)
        if video is not None and video.num_bytes >= self._config.video_mb * _MB:
            video.close()
            file.number += 1
            video = None
        if video is None:
            path = self._root / layout.VIDEOS.format(video_key=key, **file.place)
            height, width = frames.shape[1:3]
            video = VideoWriter(path, fps=fps, height=height, width=width, encoding=self._config.video)
            self._videos[key] = video
        first = video.num_frames
        video.add(frames)
        return {
            **{f"videos/{key}/{name}": value for name, value in file.place.items()},
            f"videos/{key}/from_timestamp": first / fps,
            f"videos/{key}/to_timestamp": video.num_frames / fps,
        }

    def _described_features(self) -> dict[str, Any]:
        encoding = self._config.video
        described = {}
        for name, feature in self._features.items():
            described[name] = dict(feature)
            if feature["dtype"] == "video":
                height, width, channels = feature["shape"]
                described[name]["info"] = {
                    "video.height": height,
                    "video.width": width,
                    "video.codec": "h264" if encoding.codec == "libx264" else "av1",
                    "video.pix_fmt": "yuv444p" if height % 2 or width % 2 else "yuv420p",
                    "video.is_depth_map": False,
                    "video.fps": _number(self._spec.control_hz),
                    "video.channels": channels,
                    "has_audio": False,
                }
        return described

    def _require_fit(self, episode: Episode) -> None:
        spec = self._spec
        expected = {"proprio": spec.proprio_dim, "actions": spec.action_dim, "target_actions": spec.action_dim}
        for name, size in expected.items():
            if getattr(episode, name).shape[1:] != (size,):
                raise DataError(
                    f"episode {episode.episode_id!r}: {name} has shape {getattr(episode, name).shape}, spec "
                    f"{spec.name!r} expects (L, {size})"
                )
        cameras = {camera.name for camera in spec.cameras}
        if set(episode.images) != cameras:
            raise DataError(
                f"episode {episode.episode_id!r} has cameras {sorted(episode.images)}, not {sorted(cameras)}"
            )


def _schema(features: dict[str, dict[str, Any]]) -> pa.Schema:
    kinds = {"float32": pa.float32(), "int64": pa.int64(), "bool": pa.bool_()}
    fields = []
    for name, feature in features.items():
        if feature["dtype"] != "video":
            kind, size = kinds[feature["dtype"]], feature["shape"][0]
            is_scalar = feature["names"] is None
            fields.append(pa.field(name, kind if is_scalar or size == 1 else pa.list_(kind, size)))
    return pa.schema(fields)


def _column(values: Array, kind: pa.DataType) -> pa.Array:
    if pa.types.is_fixed_size_list(kind):
        flat = pa.array(np.ascontiguousarray(values).reshape(-1), kind.value_type)
        return pa.FixedSizeListArray.from_arrays(flat, kind.list_size)
    return pa.array(values.reshape(-1), kind)


def _number(value: float) -> float | int:
    """An int where it is one: readers of the format expect it for fps."""
    return int(value) if math.isclose(value, round(value)) else value
