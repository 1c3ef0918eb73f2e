"""``vla-dist doctor --server`` against a live server: equal by every way, and it says so when a way differs."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vla_dist.cli.main import main
from vla_dist.core.errors import NotFound
from vla_dist.models.auto import build_policy, make_artifact
from vla_dist.models.conditioning import ReturnConditioning
from vla_dist.models.decision_transformer.decision_transformer import DecisionTransformer
from vla_dist.models.decision_transformer.presets import PRESETS
from vla_dist.robot.client import PolicyClient
from vla_dist.run.parity import compare_ways
from vla_dist.serving.server import SingleServer
from vla_dist.testing.fakes import FakePolicy, make_spec
from vla_dist.testing.registry import InMemoryRegistry, fake_artifact
from vla_dist.testing.serving import REFERENCE, build_service

SPEC = make_spec(max_episode_steps=50)


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[SingleServer, InMemoryRegistry]]:
    """Two versions of a real Decision Transformer."""
    registry = InMemoryRegistry()
    model = DecisionTransformer(PRESETS["small"](SPEC, hidden_dim=32, n_layers=1, context_steps=4, goal_dim=0))
    for _ in range(2):
        artifact = make_artifact(model, name="demo", spec=SPEC, conditioning=ReturnConditioning())
        registry.publish(artifact, channel="stable")
    with SingleServer(build_service(registry, load=build_policy)) as server:
        yield server, registry


def test_every_way_gives_the_same_actions(served: Any, capsys: pytest.CaptureFixture[str]) -> None:
    server, registry = served
    found = list(compare_ways(server.address, in_process=lambda name, v: build_policy(registry.fetch(name, v))))
    assert [one.way for one in found if not one.ok] == [], found
    assert len(found) == 7
    main(["doctor", "--server", server.address])
    assert "all ways give the same actions" in capsys.readouterr().out


def test_a_way_that_differs_is_told(served: Any, capsys: pytest.CaptureFixture[str]) -> None:
    server, _ = served
    found = list(compare_ways(server.address, in_process=lambda name, v: FakePolicy(SPEC, bias=0.3)))
    assert [one.way for one in found if not one.ok] == ["in this process"]
    with pytest.raises(NotFound, match="does not serve 'other@stable'"):
        list(compare_ways(server.address, policy="other@stable"))


def test_a_server_that_forgets_is_found_out() -> None:
    class Forgetful(FakePolicy):
        """Says that two observations rebuild it, and counts all of them."""

        def initial_state(self, *, timestep: int = 0) -> Any:
            return super().initial_state(timestep=0)

    registry = InMemoryRegistry()
    registry.publish(replace(fake_artifact(SPEC)), channel="stable")
    with SingleServer(build_service(registry, load=lambda artifact: Forgetful(SPEC))) as server:
        wrong = {one.way for one in compare_ways(server.address) if not one.ok}
        assert {"unary, with its history", "after a reconnect"} <= wrong
        with PolicyClient(server.address) as client:
            assert client.check(SPEC, policy=REFERENCE).policy_version == 1
    assert np.isfinite(SPEC.control_hz)
