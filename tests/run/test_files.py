import os

import pytest

from vla_dist.core.errors import NotFound
from vla_dist.run.files import CONFIG, find_run_dir, new_run_dir, write_atomically


def test_runs_started_in_one_second_get_folders_of_their_own(tmp_path):
    folders = {new_run_dir(tmp_path, "demo") for _ in range(3)}
    assert len(folders) == 3
    assert all(folder.is_dir() and folder.is_absolute() for folder in folders)


def test_the_newest_run_of_the_preset_is_found(tmp_path):
    for age, name in (
        (30, "demo-20260101-000000"),
        (20, "demo-20260101-000001-1"),
        (10, "demo-cameras-20260101-000002"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / CONFIG).write_text("{}")
        os.utime(tmp_path / name / CONFIG, (1e9 - age, 1e9 - age))
    (tmp_path / "demo-20270101-000000").mkdir()
    assert find_run_dir(tmp_path, "demo").name == "demo-20260101-000001-1"
    assert find_run_dir(tmp_path).name == "demo-cameras-20260101-000002"
    with pytest.raises(NotFound, match="vla-dist run babyai"):
        find_run_dir(tmp_path, "babyai")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "summary.json"
    write_atomically(path, "old")
    with pytest.raises(TypeError):
        write_atomically(path, 3)  # type: ignore[arg-type]
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new"
