"""The protocol is open: a client in JavaScript, made from the .proto files alone, drives an episode."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from vla_dist.core.specs import CameraSpec
from vla_dist.core.types import Observation
from vla_dist.serving.server import SingleServer
from vla_dist.testing.fakes import FakePolicy, make_spec
from vla_dist.testing.registry import InMemoryRegistry, fake_artifact
from vla_dist.testing.serving import REFERENCE, build_service

FOLDER = Path(__file__).parents[2] / "examples/node_client"
SPEC = make_spec(cameras=(CameraSpec(name="front", height=4, width=6),))

pytestmark = pytest.mark.skipif(
    shutil.which("node") is None or not (FOLDER / "node_modules").exists(),
    reason=f"needs Node.js, and 'npm install' in {FOLDER}",
)


def run(address: str, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["node", "client.mjs", address, *words], cwd=FOLDER, capture_output=True, text=True, timeout=60
    )


def test_a_client_in_javascript_gets_the_actions_of_the_policy() -> None:
    registry = InMemoryRegistry()
    registry.publish(fake_artifact(SPEC, bias=0.5, horizon=3), channel="stable")
    with SingleServer(build_service(registry), token="secret") as server:
        done = run(server.address, REFERENCE, "6", "secret")
        assert done.returncode == 0, done.stderr
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        policy, state = FakePolicy(SPEC, horizon=3, bias=0.5), FakePolicy(SPEC).initial_state()
        for step, answer in enumerate(answers):
            proprio = np.sin(step + np.arange(SPEC.proprio_dim)).astype(np.float32)
            (chunk,), (state,) = policy.act([Observation(proprio=proprio)], [state])
            assert answer["action"] == pytest.approx(chunk[0].tolist(), abs=1e-6)
            assert (answer["version"], answer["rows"]) == (1, 3)
        assert len(answers) == 6
        refused = run(server.address, REFERENCE, "1", "guess")
        assert refused.returncode == 1
        assert "bearer token" in refused.stderr
