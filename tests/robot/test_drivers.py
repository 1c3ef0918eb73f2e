"""A site's own robots, found by the entry points of whatever is installed."""

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vla_dist.cli.robot import main
from vla_dist.core.errors import ConfigError, ResourceMissing
from vla_dist.robot.drivers import build_installed, installed_drivers

_MODULE = """
from vla_dist.testing.fakes import FakeEnv, make_spec

def build(*, port, gripper="none"):
    env = FakeEnv(make_spec(action_dim=2))
    env.port, env.gripper = port, gripper
    return env
"""
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a package on the path as pip would leave it there."""

    def put(package: str, **drivers: str) -> None:
        site = tmp_path / package
        about = site / f"{package}-1.0.dist-info"
        about.mkdir(parents=True)
        (site / f"{package}.py").write_text(_MODULE)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [f"{name.replace('_', '-')} = {value}" for name, value in drivers.items()]
        (about / "entry_points.txt").write_text("\n".join(["[vla_dist.drivers]", *lines, ""]))
        monkeypatch.syspath_prepend(site)
        importlib.invalidate_caches()

    yield put
    for name in ("our_robots", "their_robots"):
        sys.modules.pop(name, None)


def test_an_installed_driver_is_built_with_its_options(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("our_robots", our_arm="our_robots:build")
    env = build_installed("our-arm", {"port": "/dev/ttyUSB0"})
    assert (env.port, env.gripper) == ("/dev/ttyUSB0", "none")  # type: ignore[attr-defined]
    main(["drivers"])
    assert capsys.readouterr().out == "our-arm  our_robots:build\n"
    main(["contract", "our-arm", "port=/dev/ttyUSB0"])
    assert len(json.loads(capsys.readouterr().out)["action"]) == 2


def test_what_cannot_be_built_is_said(install: Install) -> None:
    install("our_robots", our_arm="our_robots:build", broken="our_robots.missing:build")
    with pytest.raises(ConfigError, match="no driver 'our-arn'; did you mean 'our-arm'"):
        build_installed("our-arn", {})
    with pytest.raises(ConfigError, match="driver 'our-arm' needs port; give them as NAME=VALUE"):
        build_installed("our-arm", {})
    with pytest.raises(ConfigError, match="takes no prot; it takes port, gripper"):
        build_installed("our-arm", {"prot": "x"})
    with pytest.raises(ResourceMissing, match=r"'broken' \(our_robots\.missing:build\) cannot be imported"):
        build_installed("broken", {})


def test_two_packages_cannot_share_a_name(install: Install) -> None:
    install("our_robots", our_arm="our_robots:build")
    install("their_robots", our_arm="their_robots:build")
    with pytest.raises(ConfigError, match="two packages offer driver 'our-arm'"):
        installed_drivers()
