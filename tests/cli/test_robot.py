"""``vla-dist robot``: what a person types beside the arm."""

import json
from pathlib import Path

import pytest

from vla_dist.cli.robot import main
from vla_dist.core.errors import ConfigError
from vla_dist.core.specs import EnvSpec

_MORE = ["--tasks", "length-5-8", "--server", "127.0.0.1:1"]


def test_the_contract_of_a_driver_is_what_a_campaign_takes(capsys: pytest.CaptureFixture[str]) -> None:
    main(["contract", "gymnasium:Pendulum-v1"])
    spec = EnvSpec.from_json(json.dumps(json.loads(capsys.readouterr().out)))
    assert (spec.proprio_dim, spec.action_dim) == (3, 1)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--key", "arm.key"], "name with --ca whom the robot trusts"),
        (["--ca", "ca.pem", "--key", "arm.key"], "give both or neither"),
        (["--ca", "missing.pem"], r"cannot read missing\.pem"),
        (["noise=1"], "simulators take no noise; use --cameras"),
        (["noise"], "must be written NAME=VALUE"),
    ],
)
def test_what_cannot_work_is_said(tmp_path: Path, words: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        main(["run", "t-maze", *words, "--spool", str(tmp_path), *_MORE])
