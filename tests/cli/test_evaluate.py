"""``vla-dist evaluate A B`` on two versions of a real, small run folder."""

import dataclasses
import json

import pytest

from vla_dist.cli.main import main
from vla_dist.run.config import LearnerSettings
from vla_dist.run.config_file import load_config
from vla_dist.run.files import CONFIG
from vla_dist.run.presets import preset
from vla_dist.run.study import open_study
from vla_dist.run.study_parts import LocalParts


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    config = preset("key-to-door")
    config = dataclasses.replace(
        config,
        replay=dataclasses.replace(config.replay, min_steps=50, samples_per_insert=1e6),
        rollout=dataclasses.replace(config.rollout, episodes_per_task=30),
        model=dataclasses.replace(config.model, hidden_dim=16, n_layers=1, n_heads=2),
        learner=LearnerSettings(
            total_updates=4, publish_updates=(0, 4), batch_size=8, checkpoint_every_updates=4, updates_per_step=4
        ),
        fleet=dataclasses.replace(config.fleet, num_robots=0),
    )
    folder = tmp_path_factory.mktemp("runs") / "key-to-door-20260101-000000"
    with open_study(config, folder, LocalParts()) as study:
        study.collect()
        study.train("one", config)
    (folder / CONFIG).write_text(config.to_json())
    return folder


def said(capsys, *words):
    main(["evaluate", *map(str, words)])
    return capsys.readouterr().out


def failed(capsys, *words):
    with pytest.raises(SystemExit):
        main(["evaluate", *map(str, words)])
    return capsys.readouterr().err


def test_two_versions_are_given_the_same_episodes(capsys, run_dir, tmp_path):
    answer = tmp_path / "pair.json"
    out = said(capsys, f"{run_dir}@1", "@2", "--episodes-per-task", "12", "--json", answer)
    assert "A key-to-door" in out
    found = json.loads(answer.read_text())
    assert [found[side]["version"] for side in ("first", "second")] == [1, 2]
    episodes = [{(e["task"], e["seed"]) for e in found[side]["episodes"]} for side in ("first", "second")]
    assert episodes[0] == episodes[1]
    assert len(episodes[0]) == 12
    wins = [sum(e["success"] for e in found[side]["episodes"]) for side in ("first", "second")]
    difference = found["difference"]
    assert difference["mean"] == pytest.approx((wins[1] - wins[0]) / 12)
    assert difference["low"] <= difference["mean"] <= difference["high"]


def test_a_version_against_itself_differs_by_nothing(capsys, run_dir):
    out = said(capsys, f"{run_dir}@2", f"{run_dir}@stable", "--episodes-per-task", "6")
    assert "+0.00" in out
    assert "Neither is shown to be better" in out


def test_one_version_is_judged_as_before(capsys, run_dir, tmp_path):
    answer = tmp_path / "one.json"
    out = said(capsys, run_dir, "--version", "1", "--episodes-per-task", "3", "--json", answer)
    assert "version 1" in out
    assert len(json.loads(answer.read_text())["episodes"]) == 3


def test_versions_of_other_tasks_are_not_compared(capsys, run_dir, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    config = load_config(run_dir / CONFIG)
    config = dataclasses.replace(config, env=dataclasses.replace(config.env, tasks=("matching-door",)))
    with open_study(config, other, LocalParts()) as study:
        study.collect()
        study.train("one", config)
    (other / CONFIG).write_text(config.to_json())
    err = failed(capsys, f"{run_dir}@1", other, "--episodes-per-task", "1")
    assert err.count("\n") == 1
    assert "env.tasks ('one-door',) against ('matching-door',)" in err
    assert "9" in failed(capsys, f"{run_dir}@1", "@9", "--episodes-per-task", "1")
