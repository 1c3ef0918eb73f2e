"""An episode over the network goes as it would without one, and goes on through what happens to the server."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vla_dist.core.errors import (
    ConfigError,
    ContractMismatch,
    DataError,
    DeadlineExceeded,
    NotFound,
    ResourceMissing,
    Unauthorised,
    Unreachable,
)
from vla_dist.core.types import Array, Observation, PolicyArtifact
from vla_dist.robot.client import PolicyClient
from vla_dist.robot.reconnect_config import ReconnectConfig
from vla_dist.robot.session import Session
from vla_dist.serving.server import SingleServer
from vla_dist.serving.service_config import ServiceConfig
from vla_dist.testing.fakes import FakeEnv, FakePolicy, make_spec
from vla_dist.testing.registry import fake_artifact
from vla_dist.testing.serving import REFERENCE, build_service

SPEC = make_spec()
NOTHING: Mapping[int, Callable[[], object]] = {}


def episode(
    act: Callable[[Observation], Array], *, num_steps: int = 12, at: Mapping[int, Callable[[], object]] = NOTHING
) -> list[Array]:
    """The chunks of one episode; ``at`` says what happens before which step."""
    env = FakeEnv(SPEC)
    step = env.reset(seed=3, task="go")
    chunks = []
    for index in range(num_steps):
        at.get(index, lambda: None)()
        chunks.append(act(step.observation))
        step = env.step(chunks[-1][0])
    return chunks


def uninterrupted() -> list[Array]:
    """In process, with the policy itself."""
    policy = FakePolicy(SPEC, bias=float(np.float32(0.05)))
    memory: list[Any] = [policy.initial_state()]

    def act(observation: Observation) -> Array:
        (chunk,), memory[:] = policy.act([observation], memory)
        return chunk

    return episode(act)


def equal(left: list[Array], right: list[Array]) -> bool:
    return len(left) == len(right) and all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def over(session: Session, *, deadline_s: float = 5.0) -> Callable[[Observation], Array]:
    return lambda observation: session.act(observation, deadline_s=deadline_s).actions


def test_all_transports_give_the_same_actions(site, client: PolicyClient) -> None:  # type: ignore[no-untyped-def]
    expected = uninterrupted()

    with client.open_session(SPEC, policy=REFERENCE, robot_id="stream") as session:
        assert equal(episode(over(session)), expected)
        assert session.metrics() == {"calls": 12, "failures": 0, "reconnects": 0, "renewals": 0, "late_answers": 0}
        assert len(session.latencies_s) == 12

    grant = client.check(SPEC, policy=REFERENCE)
    seen: list[Observation] = []

    def unary(observation: Observation) -> Array:
        history = seen[-grant.context_steps :]
        start = len(seen) - len(history)
        chunk = client.act(SPEC, observation, policy=REFERENCE, grant=grant, history=history, history_start=start)
        seen.append(observation)
        return chunk.actions

    assert equal(episode(unary), expected)

    service = build_service(site.registry)
    loop = asyncio.new_event_loop()
    opened = loop.run_until_complete(service.open(reference=REFERENCE, spec=SPEC, robot_id="inline", task="go"))
    inline = episode(
        lambda o: loop.run_until_complete(service.act(opened.session_id, o, observation_id=0, deadline_s=5.0)).actions
    )
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()
    service.shut_down()
    assert equal(inline, expected)


def test_eight_robots_batched_give_the_same_actions(client: PolicyClient) -> None:
    results: list[list[Array]] = []

    def drive(index: int) -> None:
        with client.open_session(SPEC, policy=REFERENCE, robot_id=f"r{index}") as session:
            results.append(episode(over(session)))

    robots = [threading.Thread(target=drive, args=(index,)) for index in range(8)]
    for robot in robots:
        robot.start()
    for robot in robots:
        robot.join(20)
    assert len(results) == 8
    assert all(equal(result, uninterrupted()) for result in results)


@pytest.mark.parametrize("step", [1, 5])
def test_a_killed_server_changes_no_action(site, client: PolicyClient, step: int) -> None:  # type: ignore[no-untyped-def]
    def restart() -> None:
        site.kill()
        site.start()

    with client.open_session(SPEC, policy=REFERENCE, robot_id="r") as session:
        assert equal(episode(over(session), at={step: restart}), uninterrupted())
        assert session.metrics()["failures"] == 0
        assert session.metrics()["reconnects"] == 1


def test_the_server_may_be_away_for_a_while(site, client: PolicyClient) -> None:  # type: ignore[no-untyped-def]
    later = threading.Timer(0.7, site.start)

    def cut() -> None:
        site.kill()
        later.start()

    with client.open_session(SPEC, policy=REFERENCE, robot_id="r") as session:
        assert equal(episode(over(session), at={4: cut}), uninterrupted())
        assert session.metrics()["failures"] == 0
    later.join()


def test_short_deadlines_hold_through_an_outage_and_the_episode_goes_on(site, client: PolicyClient) -> None:  # type: ignore[no-untyped-def]
    observation = FakeEnv(SPEC).reset(seed=0, task="go").observation
    with client.open_session(SPEC, policy=REFERENCE, robot_id="r") as session:
        session.act(observation, deadline_s=5.0)
        site.kill()
        waits = []
        for _ in range(5):
            started = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                session.act(observation, deadline_s=0.1)
            waits.append(time.monotonic() - started)
        assert max(waits) < 0.3, waits
        site.start()
        assert session.act(observation, deadline_s=5.0).policy_version == 1
        assert session.metrics()["failures"] == 5


def test_an_outage_beyond_its_budget_ends_the_episode(site) -> None:  # type: ignore[no-untyped-def]
    reconnect = ReconnectConfig(budget_s=0.4, longest_pause_s=0.1)
    with PolicyClient(f"127.0.0.1:{site.port}", reconnect=reconnect) as client:
        session = client.open_session(SPEC, policy=REFERENCE, robot_id="r")
        site.kill()
        started = time.monotonic()
        with pytest.raises(Unreachable, match=r"for 0\.4 s; the episode cannot go on"):
            session.act(FakeEnv(SPEC).reset(seed=0, task="go").observation, deadline_s=10.0)
        assert time.monotonic() - started < 3.0
        session.close()


def test_nobody_at_the_address_is_one_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with PolicyClient(f"127.0.0.1:{port}", timeout_s=0.5) as client:
        with pytest.raises(Unreachable, match=f"127.0.0.1:{port}"):
            client.check(SPEC, policy=REFERENCE)
        with pytest.raises(Unreachable, match=f"127.0.0.1:{port} within 0.5 s"):
            client.open_session(SPEC, policy=REFERENCE, robot_id="r")


class SlowPolicy(FakePolicy):
    """Takes as long for an observation as its instruction says."""

    def act(self, observations, states, *, generator=None):  # type: ignore[no-untyped-def]
        time.sleep(max({"slow": 0.3, "slower": 1.5}.get(o.instruction, 0.0) for o in observations))
        return super().act(observations, states)


def load_slow(artifact: PolicyArtifact) -> SlowPolicy:
    return SlowPolicy(artifact.manifest.spec, horizon=artifact.manifest.horizon, bias=0.05)


def let_an_answer_come_late(session: Session) -> None:
    """The server is given more time for the slow observation than the robot itself is willing to wait."""
    send = session._stream.send  # type: ignore[union-attr]

    def patient(request) -> None:  # type: ignore[no-untyped-def]
        request.observation.deadline_ms = 5000
        send(request)

    session._stream.send = patient  # type: ignore[union-attr, method-assign]
    with pytest.raises(DeadlineExceeded):
        session.act(SLOW, deadline_s=0.1)


SLOW = Observation(proprio=np.full(5, 100, np.float32), instruction="slow")
SLOWER = Observation(proprio=np.full(5, 100, np.float32), instruction="slower")
"""Later than its deadline on a machine, too, whose event loops wait for a core."""
QUICK = Observation(proprio=np.full(5, 1, np.float32))


@pytest.mark.parametrize("killed", [False, True])
def test_a_late_answer_is_not_taken_for_the_next(make_site, killed: bool) -> None:  # type: ignore[no-untyped-def]
    """It is dropped, but the policy has seen its observation, also after a rebuild."""
    site = make_site(load=load_slow)
    policy = FakePolicy(SPEC, bias=0.05)
    with PolicyClient(f"127.0.0.1:{site.port}") as client:
        session = client.open_session(SPEC, policy=REFERENCE, robot_id="r")
        let_an_answer_come_late(session)
        if killed:
            time.sleep(0.5)
            site.kill()
            site.start()
        chunk = session.act(QUICK, deadline_s=5.0)
        session.close()
    _, (state,) = policy.act([SLOW], [policy.initial_state()])
    (expected,), _ = policy.act([QUICK], [state])
    assert chunk.observation_id == 1
    assert np.array_equal(chunk.actions, expected)
    assert session.metrics()["late_answers"] == 1


def test_the_server_refuses_in_time_and_its_memory_stays(make_site) -> None:  # type: ignore[no-untyped-def]
    site = make_site(load=load_slow)
    with PolicyClient(f"127.0.0.1:{site.port}") as client:
        with client.open_session(SPEC, policy=REFERENCE, robot_id="r") as session:
            with pytest.raises(DeadlineExceeded):
                session.act(SLOW, deadline_s=0.1)
            got = session.act(QUICK, deadline_s=5.0).actions
        (expected,), _ = FakePolicy(SPEC, bias=0.05).act([QUICK], [FakePolicy(SPEC).initial_state()])
    assert np.array_equal(got, expected)


def test_a_mismatch_is_one_sentence_before_any_motion(client: PolicyClient) -> None:
    other = replace(SPEC, control_hz=20.0, action=SPEC.action[:1])
    for call in (
        lambda: client.check(other, policy=REFERENCE),
        lambda: client.open_session(other, policy=REFERENCE, robot_id="r"),
    ):
        with pytest.raises(ContractMismatch) as caught:
            call()
        assert "control_hz 10.0 against 20.0" in str(caught.value)
        assert "action has 2 entries against 1" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_unknown_policy_names_what_there_is(client: PolicyClient) -> None:
    with pytest.raises(NotFound, match="this server has demo@stable"):
        client.open_session(SPEC, policy="demo@canary", robot_id="r")


def test_the_token_is_asked_for(site) -> None:  # type: ignore[no-untyped-def]
    with SingleServer(build_service(site.registry), token="s") as server:
        for token, words in ((None, "no bearer token"), ("t", "not this server's")):
            with PolicyClient(server.address, token=token) as client, pytest.raises(Unauthorised, match=words):
                client.open_session(SPEC, policy=REFERENCE, robot_id="r")
        with PolicyClient(server.address, token="s") as client:
            client.open_session(SPEC, policy=REFERENCE, robot_id="r").close()


def test_a_full_server_says_so(make_site) -> None:  # type: ignore[no-untyped-def]
    site = make_site(config=ServiceConfig(max_sessions=1))
    with PolicyClient(f"127.0.0.1:{site.port}") as client:
        with (
            client.open_session(SPEC, policy=REFERENCE, robot_id="r"),
            pytest.raises(ResourceMissing, match="1 robots are connected"),
        ):
            client.open_session(SPEC, policy=REFERENCE, robot_id="s")
        client.open_session(SPEC, policy=REFERENCE, robot_id="s").close()


def test_an_episode_keeps_its_version_and_the_next_gets_the_new(site, client: PolicyClient) -> None:  # type: ignore[no-untyped-def]
    def swap() -> None:
        site.registry.publish(fake_artifact(SPEC, bias=0.2), channel="stable")
        deadline = time.monotonic() + 5
        while client.health().loaded.get(("demo", 2)) is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def restart() -> None:
        site.kill()
        site.start()

    with client.open_session(SPEC, policy=REFERENCE, robot_id="old") as session:
        assert equal(episode(over(session), at={4: swap, 8: restart}), uninterrupted())
        assert session.policy_version == 1
    with client.open_session(SPEC, policy=REFERENCE, robot_id="new") as session:
        assert session.policy_version == 2
        assert not equal(episode(over(session)), uninterrupted())
    assert client.health().loaded == {("demo", 2): 0}
    (listed,) = client.policies()
    assert (listed.current_version, [v.version for v in listed.versions]) == (2, [1, 2])


def test_a_bad_observation_is_refused_and_the_session_goes_on(client: PolicyClient) -> None:
    good = FakeEnv(SPEC).reset(seed=0, task="go").observation
    with client.open_session(SPEC, policy=REFERENCE, robot_id="r") as session:
        with pytest.raises(DataError, match=r"proprio has shape \(4\), expected \(5\)"):
            session.act(replace(good, proprio=np.zeros(4, np.float32)), deadline_s=5.0)
        with pytest.raises(DataError, match="not finite"):
            session.act(replace(good, proprio=np.full(5, np.nan, np.float32)), deadline_s=5.0)
        assert session.act(good, deadline_s=5.0).observation_id == 2
        assert session.metrics()["failures"] == 2
        assert session.metrics()["reconnects"] == 0


def test_a_closed_session_says_so(client: PolicyClient) -> None:
    session = client.open_session(SPEC, policy=REFERENCE, robot_id="r")
    session.close()
    session.close()
    with pytest.raises(ConfigError, match="closed"):
        session.act(FakeEnv(SPEC).reset(seed=0, task="go").observation, deadline_s=1.0)
    assert client.health().num_sessions == 0


@pytest.mark.parametrize("settings", [{"budget_s": 0.1}, {"first_pause_s": 0.0}, {"stall_s": 0.0}, {"attempt_s": 0.0}])
def test_settings_are_checked(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        ReconnectConfig(**settings)
