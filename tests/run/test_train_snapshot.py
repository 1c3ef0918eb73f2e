import json
import logging

import pytest
from ray.train import RunConfig

from vla_dist.run.train_snapshot import mend_snapshot

NAMES = [f"update-{10 * number:010d}-abcd" for number in range(1, 4)]


@pytest.fixture
def run(tmp_path):
    """A run's folder with three checkpoints, the note about them, and how to mend and read it."""
    folder = tmp_path / "run"
    for name in NAMES:
        (folder / name).mkdir(parents=True)
    entries = [{"version": 0, "checkpoint_dir_name": name, "metrics": {"loss": 1.0}} for name in NAMES]
    note = {
        "ray_version": "2",
        "checkpoint_results": entries,
        "checkpoint_report_indices": [0, 1, 2],
        "latest_checkpoint_result": entries[-1],
        "pending_training_results": entries[-1:],
        "pending_validation_specs": [False],
        "current_report_index": 3,
        "validated_checkpoint_dir_names": [],
    }
    path = folder / "checkpoint_manager_snapshot.json"
    path.write_text(json.dumps(note))

    def mend():
        mend_snapshot(RunConfig(name="run", storage_path=str(tmp_path)))
        return json.loads(path.read_text())

    return folder, path, note, mend


def test_a_note_that_is_right_is_left_alone(run):
    _, path, _, mend = run
    before = path.stat().st_mtime_ns
    mend()
    assert path.stat().st_mtime_ns == before


def test_a_deleted_newest_checkpoint_is_forgotten_and_the_one_before_is_the_latest(run, caplog):
    folder, _, note, mend = run
    (folder / NAMES[2]).rmdir()
    with caplog.at_level(logging.WARNING):
        mended = mend()
    assert mended["latest_checkpoint_result"] == note["checkpoint_results"][1]
    assert mended["checkpoint_results"] == note["checkpoint_results"][:2]
    assert mended["checkpoint_report_indices"] == [0, 1]
    assert mended["pending_training_results"] == mended["pending_validation_specs"] == []
    assert mended["current_report_index"] == 3
    assert NAMES[2] in caplog.text


def test_a_deleted_older_checkpoint_changes_nothing_about_the_latest(run):
    folder, _, note, mend = run
    (folder / NAMES[0]).rmdir()
    mended = mend()
    assert mended["latest_checkpoint_result"] == note["latest_checkpoint_result"]
    assert mended["checkpoint_report_indices"] == [1, 2]
    assert mended["pending_validation_specs"] == [False]


def test_without_any_checkpoint_training_starts_again(run):
    folder, _, _, mend = run
    for name in NAMES:
        (folder / name).rmdir()
    mended = mend()
    assert mended["checkpoint_results"] == []
    assert mended["latest_checkpoint_result"] is None


@pytest.mark.parametrize("text", ["", '{"ray_version": "2", "checkpoint_res', "[]", "{}"])
def test_half_a_note_is_written_anew_from_the_folders(run, text, caplog):
    _, path, _, mend = run
    path.write_text(text)
    mended = mend()
    assert [entry["checkpoint_dir_name"] for entry in mended["checkpoint_results"]] == NAMES
    assert mended["latest_checkpoint_result"]["checkpoint_dir_name"] == NAMES[2]
    assert "cannot be read" in caplog.text


def test_a_run_that_has_not_begun_has_nothing_to_mend(tmp_path):
    mend_snapshot(RunConfig(name="run", storage_path=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []
