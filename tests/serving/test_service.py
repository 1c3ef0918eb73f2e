"""Sessions, contracts and deadlines of the service, without a network."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from vla_dist.core.errors import (
    ConfigError,
    ContractMismatch,
    DataError,
    DeadlineExceeded,
    NotFound,
    ResourceMissing,
    WorkerFailed,
)
from vla_dist.core.types import Observation, PolicyArtifact
from vla_dist.protocol.records import SessionLimits
from vla_dist.serving.service import PolicyService
from vla_dist.serving.service_config import ServiceConfig
from vla_dist.testing.fakes import FakePolicy, make_spec
from vla_dist.testing.registry import InMemoryRegistry, fake_artifact, load_fake
from vla_dist.testing.serving import REFERENCE, build_service

SPEC = make_spec()
CONFIG = ServiceConfig(max_sessions=2, limits=SessionLimits(idle_timeout_s=0.2, max_deadline_s=5.0))


def observe(value: float) -> Observation:
    return Observation(proprio=np.full(SPEC.proprio_dim, value, np.float32))


@pytest.fixture
def registry() -> InMemoryRegistry:
    registry = InMemoryRegistry()
    registry.publish(fake_artifact(SPEC, bias=0.5, horizon=3), channel="stable")
    return registry


@pytest.fixture
def service(registry: InMemoryRegistry) -> Iterator[PolicyService]:
    service = build_service(registry, config=CONFIG)
    yield service
    service.shut_down()


async def open_session(service: PolicyService, **changes: object) -> str:
    settings: dict[str, object] = {"reference": REFERENCE, "spec": SPEC, "robot_id": "r", "task": "go"}
    return (await service.open(**(settings | changes))).session_id  # type: ignore[arg-type]


async def act(service: PolicyService, session: str, value: float, observation_id: int = 0) -> float:
    chunk = await service.act(session, observe(value), observation_id=observation_id, deadline_s=2.0)
    return float(chunk.actions[0, 0])


async def test_a_chunk_says_what_it_is(service: PolicyService) -> None:
    session = await open_session(service)
    chunk = await service.act(session, observe(1), observation_id=7, deadline_s=2.0)
    assert chunk.actions.shape == (3, 2)
    assert (chunk.policy_version, chunk.observation_id, chunk.fallback) == (1, 7, "hold")
    assert chunk.valid_for_ms == pytest.approx(3 * 1000 / SPEC.control_hz + CONFIG.grace_ms)


async def test_sessions_do_not_share_memory(service: PolicyService) -> None:
    first, second = await open_session(service), await open_session(service)
    policy = FakePolicy(SPEC, bias=0.5)
    expected, states = [], [policy.initial_state()] * 2
    got = []
    for step in range(3):
        for robot, session in enumerate((first, second)):
            value = step + 10 * robot
            (chunk,), (states[robot],) = policy.act([observe(value)], [states[robot]])
            expected.append(float(chunk[0, 0]))
            got.append(await act(service, session, value))
    assert got == expected


async def test_history_rebuilds_the_memory(service: PolicyService) -> None:
    whole = await open_session(service)
    actions = [await act(service, whole, value) for value in (1, 2, 3, 4)]
    rebuilt = await open_session(service, history=[observe(2), observe(3)], history_start=1)
    assert await act(service, rebuilt, 4) == actions[3]
    await service.close(rebuilt)
    forgetful = await open_session(service)
    assert await act(service, forgetful, 4) != actions[3]


async def test_too_much_history_is_refused_and_leaves_no_session(service: PolicyService) -> None:
    with pytest.raises(DataError, match="3 observations, expected at most the policy's 2"):
        await open_session(service, history=[observe(1)] * 3)
    assert service.health().num_sessions == 0
    assert service.health().loaded == {("demo", 1): 0}


async def test_a_mismatch_lists_every_difference(service: PolicyService) -> None:
    other = replace(SPEC, control_hz=25.0, max_episode_steps=7, action=SPEC.action[:1])
    with pytest.raises(ContractMismatch) as caught:
        await open_session(service, spec=other)
    for words in ("control_hz 10.0 against 25.0", "max_episode_steps 20 against 7", "action has 2 entries against 1"):
        assert words in str(caught.value)
    with pytest.raises(ContractMismatch):
        await service.check(reference=REFERENCE, spec=other)
    assert service.health().loaded == {("demo", 1): 0}


async def test_admission_is_bounded_and_idle_sessions_make_room(service: PolicyService) -> None:
    first, second = await open_session(service), await open_session(service)
    with pytest.raises(ResourceMissing, match="2 robots are connected"):
        await open_session(service)
    await service.close(first)
    await service.close(first)
    await open_session(service)
    await asyncio.sleep(0.25)
    await open_session(service)
    with pytest.raises(NotFound, match="another replica holds it"):
        await act(service, second, 1)


async def test_a_crowd_at_the_door_does_not_pass_the_limit(service: PolicyService) -> None:
    results = await asyncio.gather(
        *(open_session(service, history=[observe(1)]) for _ in range(6)), return_exceptions=True
    )
    assert sum(isinstance(r, str) for r in results) == 2


@pytest.mark.parametrize("deadline_s", [0.0, -1.0, 6.0, float("nan")])
async def test_deadlines_are_bounded(service: PolicyService, deadline_s: float) -> None:
    session = await open_session(service)
    with pytest.raises(DataError, match="deadline"):
        await service.act(session, observe(1), observation_id=0, deadline_s=deadline_s)


async def test_one_session_is_computed_in_turn(service: PolicyService) -> None:
    session = await open_session(service)
    together = await asyncio.gather(*(act(service, session, value) for value in (1, 2, 3)))
    other = await open_session(service)
    assert together == [await act(service, other, value) for value in (1, 2, 3)]


async def test_act_once_agrees_with_a_session(service: PolicyService) -> None:
    session = await open_session(service)
    actions = [await act(service, session, value) for value in (1, 2, 3)]
    chunk = await service.act_once(
        reference=REFERENCE,
        policy_version=1,
        spec_digest=SPEC.digest,
        history=[observe(1), observe(2)],
        history_start=0,
        observation=observe(3),
        observation_id=5,
        deadline_s=2.0,
    )
    assert float(chunk.actions[0, 0]) == actions[2]
    assert service.health().num_sessions == 1
    with pytest.raises(ContractMismatch, match="OpenSession"):
        await service.act_once(
            reference=REFERENCE,
            policy_version=1,
            spec_digest="0" * 64,
            history=[],
            history_start=0,
            observation=observe(3),
            observation_id=5,
            deadline_s=2.0,
        )


class SlowPolicy(FakePolicy):
    """0.3 s for a proprio of 9; not a number for 8."""

    def act(self, observations, states, *, generator=None):  # type: ignore[no-untyped-def]
        if any(o.proprio[0] == 9 for o in observations):
            time.sleep(0.3)
        chunks, after = super().act(observations, states)
        pairs = zip(chunks, observations, strict=True)
        return [np.full_like(c, np.nan) if o.proprio[0] == 8 else c for c, o in pairs], after


def load_slow(artifact: PolicyArtifact) -> SlowPolicy:
    fake = load_fake(artifact)
    return SlowPolicy(fake.spec, horizon=fake.horizon, bias=fake.bias)


async def test_a_late_answer_leaves_the_memory_as_it_was(registry: InMemoryRegistry) -> None:
    service = build_service(registry, load=load_slow)
    try:
        session, undisturbed = await open_session(service), await open_session(service)
        await act(service, session, 1)
        with pytest.raises(DeadlineExceeded):
            await service.act(session, observe(9), observation_id=1, deadline_s=0.05)
        await act(service, undisturbed, 1)
        assert await act(service, session, 2) == await act(service, undisturbed, 2)
    finally:
        service.shut_down()


async def test_actions_that_are_not_finite_are_not_sent(registry: InMemoryRegistry) -> None:
    service = build_service(registry, load=load_slow)
    try:
        session = await open_session(service)
        with pytest.raises(WorkerFailed, match="version 1 of demo returned actions that are not finite"):
            await act(service, session, 8)
    finally:
        service.shut_down()


async def test_calls_without_a_session_have_a_rate_too(registry: InMemoryRegistry) -> None:
    service = build_service(registry, config=ServiceConfig(max_unary_calls_per_s=3.0))
    once = {"policy_version": 0, "spec_digest": SPEC.digest, "history": [], "history_start": 0, "observation_id": 0}
    try:
        session = await open_session(service)
        for _ in range(2):
            await service.check(reference=REFERENCE, spec=SPEC)
        await service.act_once(reference=REFERENCE, observation=observe(1), deadline_s=5.0, **once)
        refused = []
        for _ in range(20):  # a slow machine lets one more through now and then
            try:
                await service.act_once(reference=REFERENCE, observation=observe(1), deadline_s=5.0, **once)
            except ResourceMissing as error:
                refused.append(str(error))
        assert "more than 3 calls a second without a session" in refused[0]
        await act(service, session, 1)
    finally:
        service.shut_down()


def test_policies_lists_versions_and_what_is_loaded(service: PolicyService, registry: InMemoryRegistry) -> None:
    registry.publish(fake_artifact(SPEC))
    (policy,) = service.policies()
    assert (policy.policy, policy.current_version) == (REFERENCE, 1)
    assert [(v.version, v.loaded) for v in policy.versions] == [(1, True), (2, False)]
    assert policy.versions[0].spec == SPEC


@pytest.mark.parametrize("settings", [{"max_sessions": 0}, {"fallback": "pray"}, {"grace_ms": -1}])
def test_settings_are_checked(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        ServiceConfig(**settings)  # type: ignore[arg-type]
