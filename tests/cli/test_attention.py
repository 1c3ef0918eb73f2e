"""The verb's own words; what it draws is tested beside the model code, on episodes made there."""

from pathlib import Path

import pytest

from vla_dist.cli import attention
from vla_dist.core.errors import NotFound


def test_a_folder_without_a_run_is_named(tmp_path: Path):
    with pytest.raises(NotFound, match="is not the folder of a run"):
        attention.main([str(tmp_path)])


def test_help_says_what_comes_out(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        attention.main(["--help"])
    assert stopped.value.code == 0
    assert "--episode" in capsys.readouterr().out
