"""Canaries and shadows in a running service: who gets what, what comes of it, and that robots notice nothing else."""

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from vla_dist.core.types import Observation
from vla_dist.registry.canaries import RedisCanaries
from vla_dist.registry.canary_plan import CanaryPlan
from vla_dist.registry.sequential import CanaryRule
from vla_dist.replay.server import EmbeddedServer
from vla_dist.serving.event_log import EventLog, read_events
from vla_dist.serving.service import PolicyService
from vla_dist.testing.fakes import make_spec
from vla_dist.testing.registry import InMemoryRegistry, fake_artifact
from vla_dist.testing.serving import REFERENCE, build_service

SPEC = make_spec()
RULE = CanaryRule(min_episodes=5)


@pytest.fixture
def registry() -> InMemoryRegistry:
    registry = InMemoryRegistry()
    for bias in (0.1, 0.2):
        registry.publish(fake_artifact(SPEC, bias=bias))
    registry.publish(fake_artifact(make_spec(action_dim=3), bias=0.3))
    registry.set_channel("demo", "stable", 1)
    return registry


@pytest.fixture
def canaries(tmp_path: Path) -> Iterator[RedisCanaries]:
    with EmbeddedServer(tmp_path / "redis") as server:
        store = RedisCanaries(server.url)
        yield store
        store.close()


@pytest.fixture
def service(registry: InMemoryRegistry, canaries: RedisCanaries, tmp_path: Path) -> Iterator[PolicyService]:
    service = build_service(registry, canaries=canaries, shadow_log=EventLog(tmp_path / "shadow.jsonl"))
    yield service
    service.shut_down()


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)


async def version_of(service: PolicyService, robot: str) -> int:
    return (await service.check(reference=REFERENCE, spec=SPEC, robot_id=robot)).policy_version


async def test_a_share_of_the_robots_gets_the_canary_and_keeps_it(
    service: PolicyService, canaries: RedisCanaries
) -> None:
    plan = canaries.begin(CanaryPlan(name="demo", version=2, incumbent=1, share=0.5, rule=RULE), who="test")
    await until(lambda: ("demo", 2) in service.health().loaded)
    robots = [f"arm-{index}" for index in range(20)]
    for _ in range(2):
        assert [await version_of(service, robot) for robot in robots] == [2 if plan.takes(r) else 1 for r in robots]
    taken = next(robot for robot in robots if plan.takes(robot))
    grant = await service.open(reference=REFERENCE, spec=SPEC, robot_id=taken, task="go")
    assert (grant.policy_version, grant.channel) == (2, "canary")
    canaries.end("demo", "rolled_back", "enough", who="test")
    await until(lambda: not service._assignment._plans)
    assert await version_of(service, taken) == 1
    assert ("demo", 2) in service.health().loaded, "a running episode lost its version"
    await service.close(grant.session_id)
    assert ("demo", 2) not in service.health().loaded


async def test_a_worse_canary_rolls_itself_back(
    service: PolicyService, canaries: RedisCanaries, registry: InMemoryRegistry
) -> None:
    plan = canaries.begin(CanaryPlan(name="demo", version=2, incumbent=1, share=0.5, rule=RULE), who="test")
    registry.set_channel("demo", "canary", 2)
    await until(lambda: ("demo", 2) in service.health().loaded)
    for index in range(120):
        robot = f"arm-{index % 16}"
        grant = await service.open(reference=REFERENCE, spec=SPEC, robot_id=robot, task="go")
        outcome = "failure" if grant.policy_version == 2 else "success"
        await service.close(grant.session_id, outcome=outcome, episode_id=f"e{index}")
    await until(lambda: (found := canaries.plan("demo")) is not None and found.state == "rolled_back")
    await until(lambda: registry.resolve("demo@canary") == 1)  # the plan is ended first, so that one replica does it
    deadline = time.monotonic() + 5
    while {await version_of(service, f"arm-{index}") for index in range(16)} != {1}:
        assert time.monotonic() < deadline, (
            "a look at the plans that had begun may put the old one back once, not longer"
        )
    last = canaries.audit()[-1]
    assert (last["event"], last["who"]) == ("rolled_back", "sequential test")
    assert "the canary is worse" in last["reason"]
    assert plan.version == 2


async def test_a_canary_for_other_robots_stops_nobody(service: PolicyService, canaries: RedisCanaries) -> None:
    canaries.begin(CanaryPlan(name="demo", version=3, incumbent=1, share=1.0, rule=RULE), who="test")
    await until(lambda: ("demo", 3) in service.health().loaded)
    assert await version_of(service, "arm-1") == 1


async def test_a_canary_that_cannot_be_loaded_is_a_problem_and_no_more(
    service: PolicyService, canaries: RedisCanaries
) -> None:
    canaries.begin(CanaryPlan(name="demo", version=99, incumbent=1, share=1.0, rule=RULE), who="test")
    await until(lambda: any("demo@canary is not served" in problem for problem in service.health().problems))
    assert await version_of(service, "arm-1") == 1


async def test_a_shadow_is_computed_and_logged_and_never_sent(
    service: PolicyService, registry: InMemoryRegistry, tmp_path: Path
) -> None:
    registry.set_channel("demo", "shadow", 2)
    await until(lambda: ("demo", 2) in service.health().loaded)
    grant = await service.open(reference=REFERENCE, spec=SPEC, robot_id="r", task="go")
    for index in range(10):
        observation = Observation(proprio=np.full(SPEC.proprio_dim, 0.1, np.float32))
        chunk = await service.act(grant.session_id, observation, observation_id=index, deadline_s=2.0)
        assert chunk.policy_version == 1
        await asyncio.sleep(0.02)
    await service.close(grant.session_id, episode_id="e")
    (entry,) = read_events(tmp_path / "shadow.jsonl")
    assert (entry["version"], entry["shadow_version"], entry["steps"]) == (1, 2, 10)
    assert entry["mean_abs_difference"] == pytest.approx(0.1, abs=1e-6)
    registry.set_channel("demo", "shadow", 1)
    await until(lambda: ("demo", 2) not in service.health().loaded)
