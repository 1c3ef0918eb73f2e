"""Streams that are renewed before they are cut, memories that no observation rebuilds, and strangers on the address."""

import threading
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from vla_dist.core.errors import IntegrityError, Unreachable
from vla_dist.core.types import Array, Observation
from vla_dist.robot.client import PolicyClient
from vla_dist.robot.reconnect_config import ReconnectConfig
from vla_dist.robot.session import Session
from vla_dist.serving.server import SingleServer
from vla_dist.serving.service_config import ServiceConfig
from vla_dist.testing.fakes import FakeEnv, FakePolicy, make_spec
from vla_dist.testing.registry import InMemoryRegistry, fake_artifact
from vla_dist.testing.serving import REFERENCE, build_service

SPEC = make_spec(max_episode_steps=1000)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WholeEpisode:
    """The sum of all observations, and their number."""

    total: Array
    count: int


class RememberingPolicy:
    """Action = 0.001 x the sum of everything seen so far: no number of observations rebuilds it."""

    remembers_episode = True

    def __init__(self) -> None:
        self.spec = SPEC
        self.horizon = 1
        self.context_steps = 1

    def initial_state(self, *, timestep: int = 0) -> WholeEpisode:
        return WholeEpisode(total=np.zeros(1), count=timestep)

    def act(self, observations: Any, states: Any, *, generator: Any = None) -> tuple[list[Array], list[WholeEpisode]]:
        after = [
            WholeEpisode(total=state.total + observation.proprio.sum(dtype=np.float64), count=state.count + 1)
            for observation, state in zip(observations, states, strict=True)
        ]
        value = [np.float32(0.001 * state.total[0] + 0.0001 * state.count) for state in after]
        return [np.full((1, SPEC.action_dim), v, np.float32) for v in value], after


@pytest.fixture
def site(make_site):  # type: ignore[no-untyped-def]
    """A server of a policy whose last two observations are its memory."""
    return make_site(load=lambda artifact: FakePolicy(SPEC, bias=0.05))


def drive(session: Session, num_steps: int, *, each: Any = None) -> list[Array]:
    env = FakeEnv(SPEC)
    step = env.reset(seed=3, task="go")
    chunks = []
    for index in range(num_steps):
        if each is not None:
            each(index)
        chunks.append(session.act(step.observation, deadline_s=5.0).actions)
        step = env.step(chunks[-1][0])
    return chunks


def alone(policy: Any, num_steps: int) -> list[Array]:
    env, state = FakeEnv(SPEC), policy.initial_state()
    step = env.reset(seed=3, task="go")
    chunks = []
    for _ in range(num_steps):
        (chunk,), (state,) = policy.act([step.observation], [state])
        chunks.append(chunk)
        step = env.step(chunk[0])
    return chunks


def test_a_stream_is_renewed_before_it_is_left_and_no_action_changes(site) -> None:  # type: ignore[no-untyped-def]
    often = ReconnectConfig(budget_s=5.0, renew_every_s=0.05)
    with (
        PolicyClient(f"127.0.0.1:{site.port}", reconnect=often) as client,
        client.open_session(SPEC, policy=REFERENCE, robot_id="r") as session,
    ):
        chunks = drive(session, 120, each=lambda _: time.sleep(0.005))
        metrics = session.metrics()
    assert np.array_equal(chunks, alone(FakePolicy(SPEC, bias=0.05), 120))
    assert metrics["renewals"] >= 3
    assert (metrics["failures"], metrics["reconnects"]) == (0, 0)
    deadline = time.monotonic() + 5
    while site.server.service.health().num_sessions and time.monotonic() < deadline:
        time.sleep(0.01)
    assert site.server.service.health().num_sessions == 0, "a stream that was left held its session"


def test_a_server_that_will_leave_is_left_at_once(site, client: PolicyClient) -> None:  # type: ignore[no-untyped-def]
    def notice(index: int) -> None:
        if index == 5:
            site.server.service.leave(within_s=10.0)
        time.sleep(0.005)

    with client.open_session(SPEC, policy=REFERENCE, robot_id="r") as session:
        chunks = drive(session, 60, each=notice)
        assert session.metrics()["renewals"] >= 1
    assert np.array_equal(chunks, alone(FakePolicy(SPEC, bias=0.05), 60))


def test_a_grown_memory_survives_kills_of_its_server(make_site) -> None:  # type: ignore[no-untyped-def]
    config = ServiceConfig(state_every_s=0.7)  # 7 steps at 10 Hz
    site = make_site(load=lambda artifact: RememberingPolicy(), config=config)

    def kill(index: int) -> None:
        if index in (3, 7, 20, 47):
            site.kill()
            site.start()

    with (
        PolicyClient(f"127.0.0.1:{site.port}", reconnect=ReconnectConfig(budget_s=10.0)) as client,
        client.open_session(SPEC, policy=REFERENCE, robot_id="r") as session,
    ):
        assert session.grant.context_steps == 7
        chunks = drive(session, 60, each=kill)
        assert session.metrics()["reconnects"] == 4
    assert np.allclose(chunks, alone(RememberingPolicy(), 60), atol=1e-6)


def test_a_grown_memory_moves_with_its_stream(make_site) -> None:  # type: ignore[no-untyped-def]
    site = make_site(load=lambda artifact: RememberingPolicy(), config=ServiceConfig(state_every_s=0.7))
    often = ReconnectConfig(budget_s=5.0, renew_every_s=0.04)
    with (
        PolicyClient(f"127.0.0.1:{site.port}", reconnect=often) as client,
        client.open_session(SPEC, policy=REFERENCE, robot_id="r") as session,
    ):
        chunks = drive(session, 100, each=lambda _: time.sleep(0.004))
        assert session.metrics()["renewals"] >= 3
    assert np.allclose(chunks, alone(RememberingPolicy(), 100), atol=1e-6)


async def test_a_state_that_another_service_sealed_is_refused() -> None:
    registry = InMemoryRegistry()
    registry.publish(fake_artifact(SPEC), channel="stable")
    mine, other = (
        build_service(registry, load=lambda a: RememberingPolicy(), config=ServiceConfig(state_every_s=0.1), key=key)
        for key in (b"a" * 32, b"b" * 32)
    )
    opened = await other.open(reference=REFERENCE, spec=SPEC, robot_id="r", task="go")
    seen = Observation(proprio=np.ones(SPEC.proprio_dim, np.float32))
    await other.act(opened.session_id, seen, observation_id=0, deadline_s=2.0)
    state = other.state_due(opened.session_id)
    assert state is not None
    with pytest.raises(IntegrityError, match="not sealed by this service"):
        await mine.open(reference=REFERENCE, spec=SPEC, robot_id="r", task="go", state=state)
    changed = replace(state, sealed=state.sealed[:-1] + bytes([state.sealed[-1] ^ 1]))
    with pytest.raises(IntegrityError):
        await other.open(reference=REFERENCE, spec=SPEC, robot_id="r", task="go", state=changed)
    again = await other.open(reference=REFERENCE, spec=SPEC, robot_id="r", task="go", state=state)
    assert again.policy_version == 1
    mine.shut_down()
    other.shut_down()


@pytest.mark.parametrize("is_old", [False, True])
def test_a_strangers_replica_cannot_take_an_episode(site, is_old: bool) -> None:  # type: ignore[no-untyped-def]
    """An old server does not look at who is asked for; then the robot itself must see whose answer it got."""
    stranger = InMemoryRegistry()
    stranger.publish(fake_artifact(SPEC, bias=9.0), channel="stable")
    quick = ReconnectConfig(budget_s=10.0)
    with PolicyClient(f"127.0.0.1:{site.port}", reconnect=quick) as client:
        session = client.open_session(SPEC, policy=REFERENCE, robot_id="r")
        observation = FakeEnv(SPEC).reset(seed=0, task="go").observation
        session.act(observation, deadline_s=5.0)
        site.kill()
        foreign = build_service(stranger, load=lambda artifact: FakePolicy(SPEC, bias=9.0), key=b"x" * 32)
        if is_old:
            foreign._require_mine = lambda service_id: None  # type: ignore[method-assign]
        other = SingleServer(foreign, port=site.port).start()

        def back() -> None:
            other.close()
            site.start()

        later = threading.Timer(0.6, back)
        later.start()
        chunk = session.act(observation, deadline_s=10.0)
        later.join()
        assert chunk.actions.max() < 1, "the stranger's policy answered"
        session.close()
    with (
        PolicyClient(f"127.0.0.1:{site.port}", timeout_s=0.5, reconnect=quick, service_id="f" * 16) as pinned,
        pytest.raises(Unreachable, match="no session"),
    ):
        pinned.open_session(SPEC, policy=REFERENCE, robot_id="r")
