"""A LeRobot data set that we write is what the format's description says, and what we read is what was written.

``Described`` below is a reader written only from the description of the format (meta/info.json with path patterns and
features, tasks with the words as index, episodes with file indices and times, frames as rows and videos); it shares
nothing with the package.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pandas as pd
import pytest

from vla_dist.core.errors import ConfigError, DataError, IntegrityError, NotFound
from vla_dist.core.specs import CameraSpec, EnvSpec
from vla_dist.data.formats.episode import Episode, cut_episode, join_segments
from vla_dist.data.formats.lerobot_reader import Assumptions, LeRobotReader, check_lerobot
from vla_dist.data.formats.lerobot_writer import LeRobotConfig, write_lerobot
from vla_dist.data.formats.statistics import MergedStatistics, vector_statistics
from vla_dist.data.formats.video import VideoEncoding
from vla_dist.testing.fakes import make_spec

CAMERAS = (CameraSpec(name="top", height=32, width=48), CameraSpec(name="odd", height=15, width=17))
SPEC = make_spec(proprio_dim=3, action_dim=2, cameras=CAMERAS)
WORDS = ("open the drawer", "close the drawer")


def smooth(rng: np.random.Generator, length: int, camera: CameraSpec) -> np.ndarray:
    """Pictures as cameras see them: noise is what no video can keep."""
    y, x = np.mgrid[: camera.height, : camera.width] / 48.0
    phase = rng.uniform(0, 6, 3)
    steps = np.arange(length)[:, None, None] / 10.0
    channels = [127 + 100 * np.sin(3 * x + 2 * y + steps + one) for one in phase]
    return np.stack(channels, axis=-1).astype(np.uint8)


def make_episode(number: int, spec: EnvSpec = SPEC) -> Episode:
    rng, length = np.random.default_rng(number), 7 + 3 * number

    def noise(*shape: int) -> np.ndarray:
        return rng.normal(size=(length, *shape)).astype(np.float32)

    return Episode(
        episode_id=f"episode-{number}",
        robot_id=f"arm-{number % 2}",
        task="open" if number % 2 == 0 else "close",
        instruction=WORDS[number % 2],
        source="human" if number else "policy",
        policy_version=0 if number else 4,
        success=number != 1,
        proprio=noise(3),
        actions=noise(2),
        target_actions=noise(2),
        rewards=noise(),
        interventions=rng.random(length) < 0.3,
        images={camera.name: smooth(rng, length, camera) for camera in spec.cameras},
    )


def episodes(count: int = 4, spec: EnvSpec = SPEC) -> Iterator[Episode]:
    return (make_episode(number, spec) for number in range(count))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets") / "drawers"
    write_lerobot(episodes(), SPEC, root)
    return root


class Described:
    """Read by the description alone."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.info = json.loads((root / "meta/info.json").read_text())
        self.tasks = pd.read_parquet(root / "meta/tasks.parquet")
        files = sorted((root / "meta/episodes").glob("chunk-*/file-*.parquet"))
        self.episodes = pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)

    def rows(self, number: int) -> pd.DataFrame:
        episode = self.episodes.iloc[number]
        path = self.info["data_path"].format(
            chunk_index=episode["data/chunk_index"], file_index=episode["data/file_index"]
        )
        frame = pd.read_parquet(self.root / path)
        return frame[(frame["index"] >= episode["dataset_from_index"]) & (frame["index"] < episode["dataset_to_index"])]

    def video(self, number: int, key: str) -> list[np.ndarray]:
        episode = self.episodes.iloc[number]
        path = self.info["video_path"].format(
            video_key=key,
            chunk_index=episode[f"videos/{key}/chunk_index"],
            file_index=episode[f"videos/{key}/file_index"],
        )
        first, end = episode[f"videos/{key}/from_timestamp"], episode[f"videos/{key}/to_timestamp"]
        with av.open(str(self.root / path)) as container:
            return [
                frame.to_ndarray(format="rgb24")
                for frame in container.decode(video=0)
                if first - 1e-4 <= frame.time < end - 1e-4
            ]


def test_an_independent_reader_finds_what_was_recorded(root: Path) -> None:
    described = Described(root)
    info = described.info
    assert (info["codebase_version"], info["fps"], info["splits"]) == ("v3.0", 10, {"train": "0:4"})
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (4, 46, 2)
    assert info["features"]["observation.images.top"]["shape"] == [32, 48, 3]
    assert info["features"]["action"]["names"] == ["a0", "a1"]
    for number, episode in enumerate(episodes()):
        rows = described.rows(number)
        assert len(rows) == episode.num_steps == described.episodes.iloc[number]["length"]
        for name, values in (
            ("observation.state", episode.proprio),
            ("action", episode.actions),
            ("target_action", episode.target_actions),
        ):
            assert np.array_equal(np.stack(rows[name].to_list()), values)
        assert np.array_equal(rows["next.reward"].to_numpy(), episode.rewards)
        assert np.array_equal(rows["intervention"].to_numpy(), episode.interventions)
        assert rows["next.done"].tolist() == [False] * (episode.num_steps - 1) + [True]
        assert bool(rows["next.success"].iloc[-1]) == episode.success
        assert np.allclose(rows["timestamp"], np.arange(episode.num_steps) / 10)
        words = described.tasks.index[described.tasks["task_index"] == rows["task_index"].iloc[0]]
        assert words.tolist() == [episode.instruction]
        for camera in CAMERAS:
            frames = described.video(number, f"observation.images.{camera.name}")
            assert len(frames) == episode.num_steps
            error = np.abs(np.stack(frames).astype(int) - episode.images[camera.name]).mean()
            assert error < 4, f"camera {camera.name} is off by {error:.1f} of 255"


def test_statistics_are_those_of_the_numbers(root: Path) -> None:
    stats = json.loads((root / "meta/stats.json").read_text())
    actions = np.concatenate([episode.actions for episode in episodes()]).astype(float)
    for name, value in (("mean", actions.mean(0)), ("std", actions.std(0)), ("min", actions.min(0))):
        assert stats["action"][name] == pytest.approx(value.tolist(), rel=1e-5), name
    assert stats["action"]["count"] == [46]
    assert np.shape(stats["observation.images.top"]["mean"]) == (3, 1, 1)
    assert 0 < stats["observation.images.top"]["q50"][0][0][0] < 1
    assert Described(root).episodes.iloc[2]["stats/action/max"].tolist() == pytest.approx(
        make_episode(2).actions.max(0).tolist()
    )


def test_a_round_trip_keeps_all_but_the_last_shade_of_pictures(root: Path) -> None:
    reader = LeRobotReader(root)
    assert reader.spec == SPEC
    for mine, theirs in zip(episodes(), reader.episodes(), strict=True):
        for name in ("proprio", "actions", "target_actions", "rewards", "interventions"):
            assert np.array_equal(getattr(mine, name), getattr(theirs, name)), name
        for name in ("episode_id", "robot_id", "task", "instruction", "source", "policy_version", "success"):
            assert getattr(mine, name) == getattr(theirs, name), name
        for name, frames in mine.images.items():
            assert np.abs(frames.astype(int) - theirs.images[name]).mean() < 4
    assert check_lerobot(root) == []


def test_files_are_split_by_size(tmp_path: Path) -> None:
    """Many small episodes: several files of numbers and of each camera, each episode within one of them."""
    spec = replace(SPEC, cameras=CAMERAS[:1])
    many = [replace(make_episode(n % 4, spec), episode_id=f"e{n}") for n in range(16)]
    import vla_dist.data.formats.lerobot_writer as module

    original, module._MB = module._MB, 600  # "100 MB" of some hundred bytes
    try:
        write_lerobot(iter(many), spec, tmp_path / "x", config=LeRobotConfig(data_mb=2, video_mb=8))
    finally:
        module._MB = original
    assert len(list((tmp_path / "x/data").glob("*/*.parquet"))) > 1
    assert len(list((tmp_path / "x/videos").glob("*/*/*.mp4"))) > 1
    assert check_lerobot(tmp_path / "x") == []
    frames = Described(tmp_path / "x").video(13, "observation.images.top")
    assert np.abs(np.stack(frames).astype(int) - many[13].images["top"]).mean() < 4


def test_a_set_of_others_is_read_with_what_it_does_not_say(tmp_path: Path, root: Path) -> None:
    """As lerobot-record leaves it: no rewards, no outcome, nothing of ours."""
    import shutil

    import pyarrow.parquet as pq

    foreign = tmp_path / "pusht"
    shutil.copytree(root, foreign)
    info = json.loads((foreign / "meta/info.json").read_text())
    del info["vla_dist"]
    extra = ("target_action", "next.reward", "next.success", "next.done", "intervention")
    for name in extra:
        del info["features"][name]
    (foreign / "meta/info.json").write_text(json.dumps(info))
    data = foreign / "data/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(data).drop_columns(list(extra)), data)
    meta = foreign / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(meta)
    pq.write_table(table.drop_columns([name for name in table.column_names if name.startswith("vla_dist")]), meta)
    reader = LeRobotReader(foreign, assumptions=Assumptions(source="human", success=True, task="push"))
    first = next(reader.episodes())
    assert (first.source, first.success, first.task, first.episode_id) == ("human", True, "push", "pusht-000000")
    assert np.array_equal(first.target_actions, first.actions)
    assert not first.rewards.any()
    assert [d.name for d in reader.spec.action] == ["a0", "a1"]
    assert reader.spec.control_hz == 10


def test_segments_and_episodes_are_the_same_thing() -> None:
    episode = make_episode(3)
    segments = list(cut_episode(episode, SPEC, num_steps=5))
    assert [segment.length for segment in segments] == [5, 5, 5, 1]
    again = join_segments(segments)
    for name in ("proprio", "actions", "target_actions", "rewards", "interventions"):
        assert np.array_equal(getattr(episode, name), getattr(again, name)), name
    assert again.success == episode.success
    with pytest.raises(DataError, match="expected all of them in order"):
        join_segments(segments[1:])


def test_merged_statistics_are_those_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(n, 2)) for n in (1, 5, 40)]
    merged = MergedStatistics()
    for part in parts:
        merged.add(vector_statistics(part))
    whole, result = np.concatenate(parts), merged.result()
    assert result["mean"] == pytest.approx(whole.mean(0).tolist())
    assert result["std"] == pytest.approx(whole.std(0).tolist())
    assert result["max"] == pytest.approx(whole.max(0).tolist())


def test_what_cannot_work_is_said(tmp_path: Path, root: Path) -> None:
    with pytest.raises(ConfigError, match="is not empty"):
        write_lerobot(episodes(1), SPEC, root)
    with pytest.raises(DataError, match="no episode to export"):
        write_lerobot(iter(()), SPEC, tmp_path / "none")
    with pytest.raises(DataError, match="has cameras"):
        write_lerobot([replace(make_episode(0), images={})], SPEC, tmp_path / "blind")
    with pytest.raises(NotFound, match="no LeRobot data set"):
        LeRobotReader(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="must be libx264 or libsvtav1"):
        VideoEncoding(codec="mpeg1")  # type: ignore[arg-type]


def test_damage_is_named(tmp_path: Path, root: Path) -> None:
    import shutil

    def damaged(name: str) -> Path:
        shutil.copytree(root, tmp_path / name)
        return tmp_path / name

    old = damaged("old")
    info = json.loads((old / "meta/info.json").read_text())
    (old / "meta/info.json").write_text(json.dumps({**info, "codebase_version": "v2.1"}))
    with pytest.raises(DataError, match="convert_dataset_v21_to_v30"):
        LeRobotReader(old)
    wrong = damaged("wrong")
    (wrong / "meta/info.json").write_text(json.dumps({**info, "total_frames": 50}))
    assert check_lerobot(wrong) == ["meta/info.json says total_frames 50, the data set has 46"]
    cut = damaged("cut")
    video = cut / "videos/observation.images.top/chunk-000/file-000.mp4"
    video.write_bytes(video.read_bytes()[:2000])
    problems: Any = check_lerobot(cut)
    assert len(problems) >= 4
    assert "file-000.mp4" in problems[0]
    with pytest.raises(IntegrityError, match=r"file-000\.mp4"):
        next(LeRobotReader(cut).episodes())
