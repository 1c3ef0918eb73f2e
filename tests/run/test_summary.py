import dataclasses
import json

import pytest

from vla_dist.evaluation.suite import EpisodeOutcome
from vla_dist.run.summary import RunSummary


def outcomes(task, successes, trials, *, told=None):
    told = task if told is None else told
    return [
        EpisodeOutcome(task=task, told=told, seed=n, success=n < successes, obeyed=n < successes, num_steps=9)
        for n in range(trials)
    ]


@pytest.fixture
def summary(tmp_path):
    return RunSummary(
        run_dir=tmp_path,
        preset="demo",
        outcomes={1: outcomes("a", 0, 4) + outcomes("b", 1, 4), 2: outcomes("a", 4, 4) + outcomes("b", 3, 4)},
        updates_by_version={1: 0, 2: 10},
        language={"right": outcomes("b", 3, 4), "zeroed": outcomes("b", 1, 4, told=""), "wrong": outcomes("b", 0, 4)},
        steps_collected=100,
        updates=10,
        served_calls=50,
        served_calls_failed=1,
        call_p50_ms=5.0,
        call_p99_ms=20.0,
        phase_seconds={"training": 3.0},
        peak_memory_mb=1000.0,
        notes=["rollout-0 died and was started again (1 of at most 10)"],
    )


def test_versions_that_nobody_judged_are_named_without_a_rate(summary, tmp_path):
    summary = dataclasses.replace(summary, outcomes={}, language={})
    summary.write()
    assert json.loads((tmp_path / "summary.json").read_text())["versions"] == []
    text = (tmp_path / "report.md").read_text()
    assert "judged by nobody: v1 (0 updates), v2 (10 updates)" in text
    assert "learning_curve" not in text


def test_the_file_holds_what_was_seen_and_nothing_else(summary, tmp_path):
    summary.write()
    stored = json.loads((tmp_path / "summary.json").read_text())
    first, last = stored["versions"]
    assert (first["version"], first["success_mean"], first["success_by_task"]) == (1, 1 / 8, {"a": 0.0, "b": 0.25})
    assert (last["version"], last["success_mean"]) == (2, 7 / 8)
    assert last["success_interval"][0] < 7 / 8 < last["success_interval"][1]
    assert stored["language_control"] == {"right": 0.75, "zeroed": 0.25, "wrong": 0.0}
    for key, value in (
        ("steps_collected", 100),
        ("updates", 10),
        ("served_calls", 50),
        ("served_calls_failed", 1),
        ("call_p50_ms", 5.0),
        ("call_p99_ms", 20.0),
        ("phase_seconds", {"training": 3.0}),
        ("peak_memory_mb", 1000.0),
    ):
        assert stored[key] == value
    assert (tmp_path / "learning_curve.png").stat().st_size > 5000


def test_the_page_says_the_same_and_keeps_the_notes(summary):
    page = summary.to_markdown()
    assert "| a | 0/4 | 4/4 |" in page
    assert "**0.88** [" in page
    assert "| zeroed | 0.25 |" in page
    assert "50 served calls (1 failed)" in page
    assert "rollout-0 died" in page


def test_a_run_with_an_archive_says_how_much_of_it_is_there(summary):
    assert "Archived" not in summary.to_markdown()
    archived = dataclasses.replace(summary, archive={"episodes": 1234, "not_archived": 5})
    assert "Archived: 1,234 episodes; 5 complete ones are not." in archived.to_markdown()
    assert archived.to_json()["archive"] == {"episodes": 1234, "not_archived": 5}
