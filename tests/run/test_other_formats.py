"""Minari, RLDS and Rerun with their own libraries: what is written is read back by them, and means the same.

They are no dependencies of this package: ``make test-formats`` puts them into an environment of their own and sets
``VLA_DIST_FORMATS_REQUIRED``, with which a missing one fails instead of skipping.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla_dist.cli.data import main as data_main
from vla_dist.core.specs import CameraSpec, EnvSpec
from vla_dist.data.formats.episode import Episode
from vla_dist.run.data_sets import check_data_set, open_data_set, write_archive
from vla_dist.testing.fakes import make_episode, make_spec

SPEC = make_spec(proprio_dim=3, action_dim=2, cameras=(CameraSpec(name="top", height=16, width=24),))
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of what a description of a data set may leave out
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of these libraries among themselves
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        assert not os.environ.get("VLA_DIST_FORMATS_REQUIRED"), f"{package} is missing; run make test-formats"
        pytest.skip(f"{package} is not installed; make test-formats has it")


def told(number: int) -> Episode:
    return make_episode(SPEC, number, success=number != 1)


@pytest.fixture
def archive(tmp_path: Path) -> str:
    place = str(tmp_path / "archive")
    write_archive((told(number) for number in range(3)), SPEC, place, segment_steps=5, jpeg_quality=0)
    return place


def require_same(found: Episode, expected: Episode) -> None:
    for name in ("episode_id", "robot_id", "task", "instruction", "source", "success"):
        assert getattr(found, name) == getattr(expected, name), name
    for name in ("proprio", "actions", "target_actions", "rewards", "interventions"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
    assert np.array_equal(found.images["top"], expected.images["top"])


def test_a_minari_set_is_read_by_minari_and_comes_back(
    archive: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    need("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    data_main(["export", archive, "--format", "minari", "--to", "drawers/expert-v0"])
    import minari  # type: ignore[import-not-found]

    stored = minari.load_dataset("drawers/expert-v0")
    assert (stored.total_episodes, stored.total_steps) == (3, 36)
    first: Any = stored[0]
    assert np.array_equal(first.observations["proprio"][:12], told(0).proprio)
    assert first.observations["instruction"][0] == "open the drawer"
    assert [bool(end) for end in first.terminations] == [False] * 11 + [True]
    assert stored[1].truncations[-1], "a failure is no end of the task"
    back = open_data_set("minari:drawers/expert-v0")
    assert back.spec == EnvSpec.from_json(SPEC.to_json())
    for number, episode in enumerate(back.episodes()):
        require_same(episode, told(number))
    data_main(["validate", "minari:drawers/expert-v0"])
    data_main(["import", "minari:drawers/expert-v0", "--to", str(tmp_path / "again"), "--segment-steps", "5"])
    assert "3 episodes, 0 problems" in capsys.readouterr().out
    assert check_data_set(str(tmp_path / "again")) == (3, [])


def test_a_minari_set_of_others_is_read_with_what_it_does_not_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    import minari  # type: ignore[import-not-found]
    import minari.data_collector  # type: ignore[import-not-found]
    from gymnasium import spaces

    rng = np.random.default_rng(0)
    minari.create_dataset_from_buffers(
        dataset_id="others/pendulum-v0",
        buffer=[
            minari.data_collector.EpisodeBuffer(
                id=number,
                observations=rng.normal(size=(21, 3)),
                actions=rng.uniform(-2, 2, (20, 1)),
                rewards=[-1.0] * 20,
                terminations=[False] * 20,
                truncations=[False] * 19 + [True],
            )
            for number in range(2)
        ],
        observation_space=spaces.Box(-8, 8, (3,)),
        action_space=spaces.Box(-2, 2, (1,)),
    )
    data = open_data_set("minari:others/pendulum-v0")
    assert (data.spec.proprio_dim, data.spec.action_dim) == (3, 1)
    episodes = list(data.episodes())
    assert [(one.num_steps, one.success, one.source) for one in episodes] == [(20, False, "human")] * 2
    assert write_archive(episodes, data.spec, str(tmp_path / "archive")) == 2


def test_an_rlds_set_is_read_by_tensorflow_datasets(archive: str, tmp_path: Path) -> None:
    need("tensorflow_datasets")
    root = tmp_path / "rlds"
    data_main(["export", archive, "--format", "rlds", "--to", str(root)])
    import tensorflow_datasets  # type: ignore[import-not-found]

    builder = tensorflow_datasets.builder_from_directory(str(root / "episodes" / "1.0.0"))
    found: dict[str, Any] = {}
    for episode in tensorflow_datasets.as_numpy(builder.as_dataset(split="train")):
        found[episode["episode_metadata"]["episode_id"].decode()] = (
            episode["episode_metadata"],
            list(episode["steps"]),
        )
    assert set(found) == {"episode-0", "episode-1", "episode-2"}
    for number in range(3):
        expected = told(number)
        facts, steps = found[expected.episode_id]
        assert (facts["task"], facts["source"], bool(facts["success"])) == (b"open", b"human", expected.success)
        assert [bool(step["is_first"]) for step in steps] == [True] + [False] * 11
        assert [bool(step["is_last"]) for step in steps] == [False] * 11 + [True]
        assert bool(steps[-1]["is_terminal"]) == expected.success
        assert [bool(step["is_intervention"]) for step in steps] == expected.interventions.tolist()
        assert steps[3]["language_instruction"] == b"open the drawer"
        for name, values in (
            ("action", expected.actions),
            ("target_action", expected.target_actions),
            ("reward", expected.rewards),
        ):
            assert np.array_equal(np.stack([step[name] for step in steps]), values), name
        assert np.array_equal(np.stack([step["observation"]["state"] for step in steps]), expected.proprio)
        assert np.array_equal(np.stack([step["observation"]["top"] for step in steps]), expected.images["top"])


def test_a_rerun_recording_holds_every_step(archive: str, tmp_path: Path) -> None:
    need("rerun")
    path = tmp_path / "episode.rrd"
    data_main(["view", archive, "--episode", "episode-0", "--to", str(path)])
    rerun = str(Path(sys.executable).with_name("rerun"))
    checked = subprocess.run([rerun, "rrd", "verify", str(path)], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stderr
    printed = subprocess.run([rerun, "rrd", "print", "-vvv", str(path)], capture_output=True, text=True, timeout=60)
    assert printed.returncode == 0, printed.stderr
    episode = told(0)
    numbers = np.array([float(word) for word in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", printed.stdout)])
    for entity in ("proprio", "action", "reward", "return_to_go", "intervention", "camera/top"):
        assert f"/{entity}" in printed.stdout, entity
    for value in [*episode.rewards, *episode.returns_to_go, *episode.proprio.ravel(), *episode.actions.ravel()]:
        assert np.isclose(numbers, value, rtol=1e-5, atol=1e-7).any(), value
