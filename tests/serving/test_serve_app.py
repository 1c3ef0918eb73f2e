"""The fleet's endpoint for real: Ray Serve, HAProxy, a replica that is killed and a version that is swapped."""

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import ray
from ray import cloudpickle

from vla_dist.core.errors import ConfigError, ContractMismatch, NotFound, ResourceMissing, Unauthorised, VlaDistError
from vla_dist.core.types import Array
from vla_dist.robot.client import PolicyClient
from vla_dist.robot.fleet_client import FleetClient
from vla_dist.robot.session import Session
from vla_dist.robot.spool import Spool
from vla_dist.robot.spool_writer import spool_sink
from vla_dist.robot.uploader import SpoolUploader
from vla_dist.serving.channel_client import ChannelClient
from vla_dist.serving.ingest import FleetIngest, IngestConfig
from vla_dist.serving.service import PolicyService
from vla_dist.testing.attack import attack, codes_of_a_stranger, codes_of_reflection
from vla_dist.testing.fakes import FakeEnv, FakePolicy, make_segment, make_spec
from vla_dist.testing.registry import InMemoryRegistry, fake_artifact
from vla_dist.testing.serving import REFERENCE, ListTable, build_service

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own settings use a spelling that pydantic deprecates
    from vla_dist.run import serve_app
    from vla_dist.run.serve_app import ServingHandle, apply_serving_environment, start_serving

SPEC = make_spec(max_episode_steps=1000)
BIASES = (0.01, 0.02)
TOKEN = "secret"


class FileRegistry(InMemoryRegistry):
    """Versions 1 and 2 in every process, and a channel in a file that all processes see."""

    def __init__(self, channel: Path) -> None:
        super().__init__()
        self._channel = channel
        for bias in BIASES:
            self.publish(fake_artifact(SPEC, bias=bias))

    def resolve(self, reference: str) -> int:
        target = reference.partition("@")[2]
        return int(target) if target.isdigit() else int(self._channel.read_text())

    def follow(self, reference: str, *, after: int, timeout_s: float) -> int:
        deadline = time.monotonic() + timeout_s
        while (version := self.resolve(reference)) == after and time.monotonic() < deadline:
            time.sleep(0.02)
        return version


@pytest.fixture(scope="module")
def channel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("registry") / "stable"
    path.write_text("1")
    return path


@pytest.fixture(scope="module")
def serving(channel: Path) -> Iterator[ServingHandle]:
    def build() -> tuple[PolicyService, FleetIngest]:
        return build_service(FileRegistry(channel)), FleetIngest(ListTable(), SPEC, IngestConfig(num_steps=8))

    before = dict(os.environ)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    folder = apply_serving_environment()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20)
    try:
        with start_serving(build, port=0, num_replicas=1, num_cpus=0.5, token=TOKEN) as serving:
            yield serving
            haproxies = serving.haproxy_pids
            assert haproxies
        assert not any(psutil.pid_exists(pid) for pid in haproxies), "HAProxy outlived its application"
        assert not folder.exists()
    finally:
        ray.shutdown()
        os.environ.clear()
        os.environ.update(before)
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def client(serving: ServingHandle) -> Iterator[PolicyClient]:
    with PolicyClient(serving.address, token=TOKEN, timeout_s=20.0) as client:
        yield client


pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore"),  # Ray leaves files and sockets to the garbage collector
]


def drive(session: Session, num_steps: int, *, at: int = -1, then: Any = None) -> list[Array]:
    env = FakeEnv(SPEC)
    step = env.reset(seed=4, task="go")
    chunks = []
    for index in range(num_steps):
        if index == at:
            then()
        chunks.append(session.act(step.observation, deadline_s=30.0).actions)
        step = env.step(chunks[-1][0])
    return chunks


def in_process(bias: float, num_steps: int) -> list[Array]:
    policy = FakePolicy(SPEC, bias=float(np.float32(bias)))
    env, state = FakeEnv(SPEC), policy.initial_state()
    step = env.reset(seed=4, task="go")
    chunks = []
    for _ in range(num_steps):
        (chunk,), (state,) = policy.act([step.observation], [state])
        chunks.append(chunk)
        step = env.step(chunk[0])
    return chunks


def equal(left: list[Array], right: list[Array]) -> bool:
    return len(left) == len(right) and all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def replica_pids() -> list[int]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ServeReplica" in process.name():
                found.append(process.pid)
        except psutil.NoSuchProcess:
            continue
    return found


def channels_by(client: PolicyClient) -> ChannelClient:
    return ChannelClient(client.channel, address=client.address, metadata=client.call_metadata)


def test_streams_and_calls_give_the_actions_of_the_policy(client: PolicyClient) -> None:
    with client.open_session(SPEC, policy=REFERENCE, robot_id="r") as session:
        assert equal(drive(session, 50), in_process(BIASES[0], 50))
    grant = client.check(SPEC, policy=REFERENCE)
    observation = FakeEnv(SPEC).reset(seed=4, task="go").observation
    assert np.array_equal(
        client.act(SPEC, observation, policy=REFERENCE, grant=grant).actions, in_process(BIASES[0], 1)[0]
    )
    assert client.health().loaded == {("demo", 1): 0}


def test_refusals_come_through_the_proxy_with_their_whole_sentence(
    serving: ServingHandle, client: PolicyClient
) -> None:
    other = make_spec(action_dim=3, max_episode_steps=7)
    for call in (
        lambda: client.check(other, policy=REFERENCE),
        lambda: client.open_session(other, policy=REFERENCE, robot_id="r"),
    ):
        with pytest.raises(ContractMismatch) as caught:
            call()
        assert "max_episode_steps 1000 against 7" in str(caught.value)
        assert "action has 2 entries against 3" in str(caught.value)
    with PolicyClient(serving.address) as stranger:
        for call in (
            lambda: stranger.check(SPEC, policy=REFERENCE),
            lambda: stranger.open_session(SPEC, policy=REFERENCE, robot_id="r"),
            lambda: stranger.heartbeat("r", {}),
        ):
            with pytest.raises(Unauthorised, match="no bearer token"):
                call()
        with pytest.raises(Unauthorised, match="no bearer token"):
            channels_by(stranger).reports()
    with pytest.raises(NotFound, match="moved where its registry is"):
        channels_by(client).promote("demo@2", who="")


def test_bytes_that_are_no_message_are_refused_and_those_of_strangers_not_even_read(serving: ServingHandle) -> None:
    codes = attack(serving.address, num_unary=300, num_streams=40, seed=2, token=TOKEN)
    assert codes[grpc.StatusCode.INVALID_ARGUMENT] > 50, codes
    assert codes_of_a_stranger(serving.address) == {grpc.StatusCode.UNAUTHENTICATED}
    assert codes_of_reflection(serving.address, token=TOKEN) == {grpc.StatusCode.UNIMPLEMENTED}


def test_uploads_come_through(client: PolicyClient, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    uploader = SpoolUploader(FleetClient(client, robot_id="robot-0", spool_id=spool.spool_id), spool)
    put = spool_sink(spool)
    for index in range(2):
        put(make_segment(SPEC, episode_id="e", segment_index=index, is_last=index == 1))
    uploader.flush(timeout_s=10)
    uploader.close()
    spool.close()
    assert uploader.metrics()["stored"] == 2


def test_a_swap_under_load_fails_no_call(channel: Path, serving: ServingHandle) -> None:
    stop = threading.Event()
    failures: list[object] = []
    versions: list[int] = []

    def robot(index: int) -> None:
        with PolicyClient(serving.address, token=TOKEN) as client:
            while not stop.is_set():
                try:
                    with client.open_session(SPEC, policy=REFERENCE, robot_id=f"r{index}") as session:
                        chunks = drive(session, 20)
                        version = session.policy_version
                        assert equal(chunks, in_process(BIASES[version - 1], 20)), "a mixed episode"
                        versions.append(version)
                        if session.metrics()["failures"] or session.metrics()["reconnects"]:
                            failures.append(session.metrics())
                except Exception as error:
                    failures.append(error)
                    return

    robots = [threading.Thread(target=robot, args=(index,)) for index in range(4)]
    for thread in robots:
        thread.start()
    time.sleep(1.0)
    channel.write_text("2")
    deadline = time.monotonic() + 10
    while 2 not in versions and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)
    stop.set()
    for thread in robots:
        thread.join(30)
    assert failures == []
    assert set(versions) == {1, 2}


def test_a_killed_replica_changes_no_action(client: PolicyClient) -> None:
    def kill() -> None:
        (pid,) = replica_pids()
        os.kill(pid, signal.SIGKILL)

    with client.open_session(SPEC, policy=REFERENCE, robot_id="r") as session:
        chunks = drive(session, 30, at=15, then=kill)
        assert equal(chunks, in_process(BIASES[session.policy_version - 1], 30))
        assert session.metrics()["failures"] == 0
        assert session.metrics()["reconnects"] == 1


def test_a_replica_is_not_put_behind_the_rest_of_its_machine(serving: ServingHandle) -> None:
    assert replica_pids()
    assert {os.getpriority(os.PRIO_PROCESS, pid) for pid in replica_pids()} == {os.getpriority(os.PRIO_PROCESS, 0)}


def test_a_second_application_is_refused(serving: ServingHandle) -> None:
    with pytest.raises(ResourceMissing, match="Serve runs in this Ray cluster already"):
        start_serving(lambda: None, port=0, num_replicas=1, num_cpus=0.1, token=None)  # type: ignore[arg-type, return-value]
    with pytest.raises(ConfigError, match=r"before ray\.init"):
        apply_serving_environment()
    with pytest.raises(ResourceMissing, match=f"port {serving.port} on 127.0.0.1 is taken"):
        serve_app.require_free_port("127.0.0.1", serving.port)


def test_nothing_but_haproxys_own_ports_listens_for_the_world(serving: ServingHandle) -> None:
    addresses = {
        connection.laddr.ip
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == serving.port
    }
    assert addresses == {"127.0.0.1"}


def robots_beside(
    serving: ServingHandle, trouble: Any, *, num_robots: int = 4, seconds: float = 12.0, may_lose: bool = False
) -> list[Any]:
    """Episodes of several robots while ``trouble()`` happens; every action is compared with the policy's own."""
    stop, results = threading.Event(), []
    lost: list[tuple[float, VlaDistError]] = []
    begun = time.monotonic()

    def robot(index: int) -> None:
        with PolicyClient(serving.address, token=TOKEN, timeout_s=30.0) as client:
            while not stop.is_set():
                try:
                    with client.open_session(SPEC, policy=REFERENCE, robot_id=f"r{index}") as session:
                        chunks = drive(session, 40)
                        right = equal(chunks, in_process(BIASES[session.policy_version - 1], 40))
                        results.append((right, session.metrics()))
                except VlaDistError as error:  # this episode is lost; the robot begins the next one
                    lost.append((time.monotonic() - begun, error))
                    time.sleep(0.5)

    robots = [threading.Thread(target=robot, args=(index,)) for index in range(num_robots)]
    for thread in robots:
        thread.start()
    time.sleep(1.0)
    before = len(results)
    trouble()
    deadline = time.monotonic() + 80
    until = time.monotonic() + seconds
    while (time.monotonic() < until or len(results) < before + 2 * num_robots) and time.monotonic() < deadline:
        time.sleep(0.1)
    stop.set()
    for thread in robots:
        thread.join(60)
    assert len(results) >= before + 2 * num_robots, f"the robots did not come back; episodes were lost at {lost}"
    assert not lost or may_lose, f"episodes were lost at {lost}"
    return results


@pytest.mark.slow
@pytest.mark.chaos
def test_robots_go_on_when_the_controller_is_killed(serving: ServingHandle) -> None:
    def kill() -> None:
        pids = [p.pid for p in psutil.Process().children(recursive=True) if "ServeController" in p.name()]
        assert pids
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    results = robots_beside(serving, kill)
    assert all(right for right, _ in results), "an action changed"
    assert sum(metrics["failures"] for _, metrics in results) == 0


@pytest.mark.slow
@pytest.mark.chaos
def test_robots_come_back_by_themselves_when_the_ingress_is_killed(serving: ServingHandle) -> None:
    def kill() -> None:
        pids = serving.haproxy_pids
        assert pids
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    # Serve needs longer for another one than a robot keeps an episode.
    results = robots_beside(serving, kill, seconds=20.0, may_lose=True)
    assert all(right for right, _ in results), "an action changed"


@pytest.mark.slow
@pytest.mark.chaos
def test_a_replica_killed_under_load_changes_no_action(serving: ServingHandle) -> None:
    def kill() -> None:
        for pid in replica_pids():
            os.kill(pid, signal.SIGKILL)

    results = robots_beside(serving, kill)
    assert all(right for right, _ in results), "an action changed"
    assert sum(metrics["failures"] for _, metrics in results) == 0


@pytest.mark.slow
@pytest.mark.chaos
def test_a_deploy_under_load_changes_no_action(serving: ServingHandle) -> None:
    def deploy() -> None:
        serving.scale(2)
        time.sleep(4.0)
        serving.scale(1)

    results = robots_beside(serving, deploy, seconds=20.0)
    assert all(right for right, _ in results), "an action changed"
    assert sum(metrics["failures"] for _, metrics in results) == 0
