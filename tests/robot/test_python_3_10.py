"""A robot with Python 3.10 and the base install alone: it drives, reconnects, records and uploads."""

import glob
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]

_ROBOT = """
import asyncio, pathlib, sys
assert sys.version_info[:2] == (3, 10), sys.version
from vla_dist.robot.async_client import AsyncPolicyClient
from vla_dist.robot.client import PolicyClient
from vla_dist.robot.control_loop import ControlConfig, ControlLoop
from vla_dist.robot.fleet_client import FleetClient
from vla_dist.robot.spool import Spool
from vla_dist.robot.spool_writer import spool_sink
from vla_dist.robot.uploader import SpoolUploader
from vla_dist.testing.fakes import FakeEnv, FakePolicy, make_spec

address, folder = sys.argv[1], pathlib.Path(sys.argv[2])
spec = make_spec()
policy, env = FakePolicy(spec, bias=float(sys.argv[3])), FakeEnv(spec)
state, step = policy.initial_state(), env.reset(seed=3, task="go")
with PolicyClient(address) as client:
    assert client.health().num_sessions == 0
    with client.open_session(spec, policy="demo@stable", robot_id="r") as session:
        for index in range(12):
            if index == 6:
                session.reconnect()
            chunk = session.act(step.observation, deadline_s=20.0)
            (expected,), (state,) = policy.act([step.observation], [state])
            assert (chunk.actions == expected).all(), index
            step = env.step(chunk.actions[0])
        assert session.metrics()["reconnects"] == 1
    spool = Spool(folder)
    uploader = SpoolUploader(FleetClient(client, robot_id="r", spool_id=spool.spool_id), spool)
    config = ControlConfig(policy="demo@stable", robot_id="r", control_hz=None, segment_steps=8)
    report = ControlLoop(FakeEnv(spec), client, config, on_segment=spool_sink(spool)).run_episode(seed=3, task="go")
    assert not report.lost, report.lost
    uploader.flush(timeout_s=30)
    uploader.close()
    spool.close()

async def ask():
    async with AsyncPolicyClient(address) as client:
        async with await client.open_session(spec, policy="demo@stable", robot_id="r") as session:
            return await session.act(step.observation, deadline_s=20.0)

assert asyncio.run(ask()).actions.shape == (1, spec.action_dim)
installed = {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
print(report.num_steps, *sorted(name for name in installed if not name.startswith("_")))
"""


def interpreter() -> str | None:
    """A Python 3.10 of this machine; the one in VLA_DIST_PYTHON_3_10 first."""
    candidates = [os.environ.get("VLA_DIST_PYTHON_3_10"), shutil.which("python3.10")]
    candidates += sorted(glob.glob(str(Path.home() / ".pyenv/versions/3.10.*/bin/python")))
    for candidate in filter(None, candidates):
        said = subprocess.run([candidate, "--version"], capture_output=True, text=True, timeout=20)
        if said.returncode == 0 and said.stdout.startswith("Python 3.10"):
            return candidate
    return None


def requirements(which: str) -> list[str]:
    """Of the base install: the newest, or the oldest that it allows."""
    import tomllib

    allowed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return allowed if which == "newest" else [re.sub(r">=([\d.]+)", r"==\1.*", one) for one in allowed]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("which", ["newest", "oldest"])
def test_a_robot_with_the_base_install_alone(site: Any, tmp_path: Path, which: str) -> None:
    python = interpreter()
    if python is None:
        pytest.skip("needs a Python 3.10; name one in VLA_DIST_PYTHON_3_10")
    subprocess.run([python, "-m", "venv", tmp_path / "venv"], check=True, timeout=120)
    robot = tmp_path / "venv/bin/python"
    subprocess.run([robot, "-m", "pip", "install", "-q", *requirements(which)], check=True, timeout=240)
    done = subprocess.run(
        [
            robot,
            "-W",
            "error",
            "-c",
            _ROBOT,
            site.server.address,
            str(tmp_path / "spool"),
            str(np.float32(0.05).item()),
        ],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    steps, *installed = done.stdout.split()
    assert sum(segment.length for segment in site.table.segments.values()) == int(steps)
    made_by_compilers = {"typing_extensions", "cython_runtime"}
    assert set(installed) - made_by_compilers == {"numpy", "grpc", "google", "vla_dist"}
