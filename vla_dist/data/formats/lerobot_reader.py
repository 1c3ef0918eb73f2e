"""Episodes of a LeRobot data set, version 3.0, written by anybody.

Source: huggingface/lerobot 0.4; see ``lerobot_layout``.
"""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vla_dist.core.errors import DataError, IntegrityError
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import SOURCES, Array, Source
from vla_dist.data.formats import lerobot_layout as layout
from vla_dist.data.formats.episode import Episode
from vla_dist.data.formats.video import read_frames

_DEFAULT_PATHS = {"data_path": layout.DATA, "video_path": layout.VIDEOS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What a data set of others does not say."""

    source: Source = "human"
    success: bool = True
    """Where there is no ``next.success``: demonstrations are kept because they went well."""
    task: str = ""
    """Machine name of every task; empty: the words, shortened."""


class LeRobotReader:
    """A data set on disk.

    Raises:
        NotFound: there is none.
        DataError: another version, or a feature that has no place in a contract.
    """

    def __init__(self, root: Path, *, assumptions: Assumptions | None = None) -> None:
        self.root = root
        self.info = layout.load_info(root)
        self.spec: EnvSpec = layout.spec_of(self.info, name=root.name)
        self._assumptions = assumptions or Assumptions()
        self._tasks = _read_tasks(root / layout.TASKS)
        self._rows = _read_episodes(root)
        self._cached: tuple[Path, pa.Table] | None = None

    @property
    def num_episodes(self) -> int:
        return len(self._rows)

    @property
    def num_steps(self) -> int:
        return sum(int(row["length"]) for row in self._rows)

    def episodes(self) -> Iterator[Episode]:
        """Each in its order; memory holds one, and the file of numbers it lies in.

        Raises:
            IntegrityError: files that contradict each other, named.
        """
        for row in self._rows:
            yield self.episode(row)

    def episode(self, row: Mapping[str, Any]) -> Episode:
        number, length = int(row["episode_index"]), int(row["length"])
        numbers = self._numbers(row)
        if len(numbers) != length:
            raise IntegrityError(
                f"episode {number} of {self.root} has {len(numbers)} rows, its meta data says {length}"
            )
        actions = _vectors(numbers, layout.ACTION)
        assert actions is not None
        proprio = _vectors(numbers, layout.STATE)
        targets = _vectors(numbers, layout.TARGET)
        words = self._words(numbers, number)
        return Episode(
            episode_id=str(row.get(f"{layout.OWN}/episode_id") or f"{self.root.name[:40]}-{number:06d}"),
            robot_id=str(row.get(f"{layout.OWN}/robot_id") or self.info.get("robot_type") or "lerobot")[:64],
            task=str(row.get(f"{layout.OWN}/task") or self._assumptions.task or _short(words)),
            instruction=words,
            source=_source(row.get(f"{layout.OWN}/source")) or self._assumptions.source,
            policy_version=int(row.get(f"{layout.OWN}/policy_version") or 0),
            success=self._success(numbers),
            proprio=np.zeros((length, 0), np.float32) if proprio is None else proprio,
            actions=actions,
            target_actions=actions if targets is None else targets,
            rewards=_scalars(numbers, layout.REWARD, length).astype(np.float32),
            interventions=_scalars(numbers, layout.TAKEN, length).astype(bool),
            images={camera.name: self._frames(camera.name, row, numbers) for camera in self.spec.cameras},
        )

    def _numbers(self, row: Mapping[str, Any]) -> pa.Table:
        pattern = self.info.get("data_path") or _DEFAULT_PATHS["data_path"]
        path = self.root / pattern.format(
            chunk_index=int(row["data/chunk_index"]), file_index=int(row["data/file_index"])
        )
        if self._cached is None or self._cached[0] != path:
            try:
                self._cached = path, pq.read_table(path)
            except (OSError, pa.ArrowException) as error:
                raise IntegrityError(f"{path} cannot be read ({error})") from error
        table = self._cached[1]
        mine = np.flatnonzero(table["episode_index"].to_numpy() == int(row["episode_index"]))
        if not len(mine):
            return table.slice(0, 0)
        return table.slice(int(mine[0]), len(mine))

    def _words(self, numbers: pa.Table, episode: int) -> str:
        indices = set(numbers["task_index"].to_pylist())
        unknown = indices - set(self._tasks)
        if unknown:
            raise IntegrityError(f"episode {episode} of {self.root} has task_index {sorted(unknown)}, which is no task")
        return self._tasks[numbers["task_index"][0].as_py()]

    def _success(self, numbers: pa.Table) -> bool:
        if layout.SUCCESS not in numbers.column_names:
            return self._assumptions.success
        return bool(np.any(_scalars(numbers, layout.SUCCESS, len(numbers))))

    def _frames(self, camera: str, row: Mapping[str, Any], numbers: pa.Table) -> Array:
        key = f"{layout.IMAGES}{camera}" if f"{layout.IMAGES}{camera}" in self.info["features"] else camera
        if self.info["features"][key]["dtype"] == "image":
            return np.stack([_picture(self.root, one) for one in numbers[key].to_pylist()])
        pattern = self.info.get("video_path") or _DEFAULT_PATHS["video_path"]
        path = self.root / pattern.format(
            video_key=key,
            chunk_index=int(row[f"videos/{key}/chunk_index"]),
            file_index=int(row[f"videos/{key}/file_index"]),
        )
        first_s, fps = float(row[f"videos/{key}/from_timestamp"]), float(self.info["fps"])
        return read_frames(path, first_s=first_s, count=int(row["length"]), fps=fps)


def check_lerobot(root: Path) -> list[str]:
    """What is wrong with a data set, one sentence each: totals, indices, times, videos. Reads all of it."""
    problems: list[str] = []
    try:
        reader = LeRobotReader(root)
    except DataError as error:
        return [str(error)]
    info, steps = reader.info, 0
    for row in reader._rows:
        number = int(row["episode_index"])
        try:
            episode = reader.episode(row)
        except DataError as error:
            problems.append(str(error))
            continue
        numbers = reader._numbers(row)
        expected = np.arange(episode.num_steps)
        if not np.array_equal(numbers["index"].to_numpy(), steps + expected):
            problems.append(f"episode {number}: its index does not go on from {steps}")
        if not np.array_equal(numbers["frame_index"].to_numpy(), expected):
            problems.append(f"episode {number}: its frame_index does not count from 0")
        if not np.allclose(numbers["timestamp"].to_numpy(), expected / float(info["fps"]), atol=1e-3):
            problems.append(f"episode {number}: its timestamps are not frame_index / fps {info['fps']}")
        for name in ("proprio", "actions", "rewards"):
            if not np.isfinite(getattr(episode, name)).all():
                problems.append(f"episode {number}: {name} holds NaN or infinity")
        steps += episode.num_steps
    for name, found in (("total_episodes", reader.num_episodes), ("total_frames", steps)):
        if info[name] != found:
            problems.append(f"{layout.INFO} says {name} {info[name]}, the data set has {found}")
    return problems


def _read_tasks(path: Path) -> dict[int, str]:
    """Task index to words: those are the table's other column, whatever it is called."""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read ({error})") from error
    words = [name for name in table.column_names if name != "task_index"]
    if "task_index" not in table.column_names or not words:
        raise DataError(f"{path} has columns {table.column_names}, expected task_index and the words")
    return dict(zip(table["task_index"].to_pylist(), map(str, table[words[0]].to_pylist()), strict=True))


def _read_episodes(root: Path) -> list[dict[str, Any]]:
    files = sorted((root / "meta/episodes").glob("*/*.parquet"))
    if not files:
        raise DataError(f"{root}/meta/episodes holds no Parquet file")
    rows: list[dict[str, Any]] = []
    for file in files:
        try:
            schema = pq.read_schema(file)
            columns = [name for name in schema.names if not name.startswith("stats/")]
            rows += pq.read_table(file, columns=columns).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{file} cannot be read ({error})") from error
    return sorted(rows, key=lambda row: int(row["episode_index"]))


def _vectors(numbers: pa.Table, name: str) -> Array | None:
    """(L, D) float32."""
    if name not in numbers.column_names:
        return None
    column = numbers[name].combine_chunks()
    values = np.array(column.to_pylist(), np.float32)
    return values.reshape(len(values), -1)


def _scalars(numbers: pa.Table, name: str, length: int) -> Array:
    if name not in numbers.column_names:
        return np.zeros(length)
    return np.array(numbers[name].to_pylist(), np.float64).reshape(length)


def _picture(root: Path, value: Mapping[str, Any]) -> Array:
    data = value.get("bytes") or (root / str(value["path"])).read_bytes()
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB"), np.uint8)


def _source(text: object) -> Source | None:
    return next((source for source in SOURCES if source == text), None)


def _short(words: str) -> str:
    """A name of at most 64 bytes from words."""
    kept = "".join(letter if letter.isalnum() else "-" for letter in words.lower()).strip("-")
    return kept.encode()[:64].decode(errors="ignore") or "task"
