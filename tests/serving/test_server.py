"""What the wire itself must get right: ports, tokens, status codes, and messages that are not ours."""

import queue
import socket
import threading
import time
from collections.abc import Iterator

import grpc
import numpy as np
import pytest

from vla_dist.core.errors import ConfigError, ResourceMissing
from vla_dist.core.types import Observation
from vla_dist.protocol.conversion import encode_observation, encode_spec
from vla_dist.protocol.records import SessionLimits
from vla_dist.protocol.v1 import fleet_pb2, fleet_pb2_grpc, policy_pb2, policy_pb2_grpc
from vla_dist.serving.ingest import FleetIngest, IngestConfig
from vla_dist.serving.server import SingleServer
from vla_dist.serving.service_config import ServiceConfig
from vla_dist.testing import hostile
from vla_dist.testing.fakes import make_spec
from vla_dist.testing.registry import InMemoryRegistry, fake_artifact
from vla_dist.testing.serving import REFERENCE, ListTable, build_service

SPEC = make_spec()
TOKEN = (("authorization", "Bearer secret"),)
OPEN = policy_pb2.OpenSessionRequest(spec=encode_spec(SPEC), policy=REFERENCE, robot_id="r")


@pytest.fixture
def registry() -> InMemoryRegistry:
    registry = InMemoryRegistry()
    registry.publish(fake_artifact(SPEC), channel="stable")
    return registry


@pytest.fixture
def server(registry: InMemoryRegistry) -> Iterator[SingleServer]:
    service = build_service(registry, config=ServiceConfig(limits=SessionLimits(idle_timeout_s=0.4)))
    ingest = FleetIngest(ListTable(), SPEC, IngestConfig(num_steps=8))
    with SingleServer(service, ingest=ingest, token="secret") as server:
        yield server


@pytest.fixture
def channel(server: SingleServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


def status(error: "pytest.ExceptionInfo[grpc.RpcError]") -> tuple[grpc.StatusCode, str]:
    return error.value.code(), error.value.details()  # type: ignore[attr-defined]


def test_a_taken_port_is_refused_in_one_sentence(server: SingleServer, registry: InMemoryRegistry) -> None:
    service = build_service(registry)
    with pytest.raises(ResourceMissing, match=f"cannot listen on 127.0.0.1:{server.port}: the port is taken"):
        SingleServer(service, port=server.port).start()
    assert not service.batcher.is_alive, "the service that nobody can reach goes on"


def test_a_port_taken_by_another_program_is_refused(registry: InMemoryRegistry) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(ResourceMissing):
        SingleServer(build_service(registry), port=other.getsockname()[1]).start()


def test_a_server_that_never_started_can_be_closed(registry: InMemoryRegistry) -> None:
    service = build_service(registry)
    server = SingleServer(service)
    server.close()
    server.close()
    assert not service.batcher.is_alive


def test_an_empty_token_is_a_mistake(registry: InMemoryRegistry) -> None:
    service = build_service(registry)
    with pytest.raises(ConfigError, match="empty"):
        SingleServer(service, token="")
    service.shut_down()


@pytest.mark.parametrize(
    ("metadata", "words"),
    [((), "has no bearer token"), ((("authorization", "Bearer wrong"),), "not this server's")],
)
def test_every_method_wants_the_token(channel: grpc.Channel, metadata: tuple[tuple[str, str], ...], words: str) -> None:
    policies, fleet = policy_pb2_grpc.PolicyServiceStub(channel), fleet_pb2_grpc.FleetServiceStub(channel)
    calls = [
        lambda: policies.OpenSession(OPEN, metadata=metadata, timeout=5),
        lambda: policies.Act(policy_pb2.ActRequest(), metadata=metadata, timeout=5),
        lambda: next(policies.Control(iter([]), metadata=metadata, timeout=5)),
        lambda: policies.ListPolicies(policy_pb2.ListPoliciesRequest(), metadata=metadata, timeout=5),
        lambda: policies.CheckHealth(policy_pb2.CheckHealthRequest(), metadata=metadata, timeout=5),
        lambda: next(fleet.Upload(iter([]), metadata=metadata, timeout=5)),
        lambda: fleet.Heartbeat(fleet_pb2.HeartbeatRequest(), metadata=metadata, timeout=5),
    ]
    for call in calls:
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert status(caught)[0] is grpc.StatusCode.UNAUTHENTICATED
        assert words in status(caught)[1]


def test_the_stream_must_begin_with_open(channel: grpc.Channel) -> None:
    stub = policy_pb2_grpc.PolicyServiceStub(channel)
    first = policy_pb2.ControlRequest(observation=policy_pb2.ControlObservation())
    with pytest.raises(grpc.RpcError) as caught:
        next(stub.Control(iter([first]), metadata=TOKEN, timeout=5))
    assert status(caught) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "the first message is 'observation', expected 'open'",
    )


def test_garbage_in_an_observation_is_refused_and_the_stream_goes_on(channel: grpc.Channel) -> None:
    good = encode_observation(Observation(proprio=np.ones(5, np.float32)))
    bad = encode_observation(Observation(proprio=np.ones(5, np.float32)))
    bad.proprio.data = b"\0" * 10_000_000
    requests = [policy_pb2.ControlRequest(open=policy_pb2.ControlOpen(session=OPEN))] + [
        policy_pb2.ControlRequest(
            observation=policy_pb2.ControlObservation(observation=o, observation_id=i, deadline_ms=1000)
        )
        for i, o in enumerate((good, bad, good))
    ]
    requests.append(policy_pb2.ControlRequest(goodbye=policy_pb2.ControlGoodbye()))
    stub = policy_pb2_grpc.PolicyServiceStub(channel)
    answers = list(stub.Control(iter(requests), metadata=TOKEN, timeout=5))
    assert [a.WhichOneof("message") for a in answers] == ["opened", "chunk", "refusal", "chunk"]
    assert answers[2].refusal.reason == policy_pb2.REFUSAL_REASON_INVALID
    assert answers[2].refusal.detail == "proprio has 10000000 bytes, expected 20 for shape (5)"
    health = stub.CheckHealth(policy_pb2.CheckHealthRequest(), metadata=TOKEN, timeout=5)
    assert health.num_sessions == 0


def test_bytes_that_are_no_message_end_the_call_and_not_the_server(channel: grpc.Channel) -> None:
    raw = channel.unary_unary("/vla_dist.v1.PolicyService/OpenSession")
    with pytest.raises(grpc.RpcError) as caught:
        raw(b"\xff" * 100, metadata=TOKEN, timeout=5)
    assert status(caught)[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert "no message of this protocol" in status(caught)[1]
    policy_pb2_grpc.PolicyServiceStub(channel).OpenSession(OPEN, metadata=TOKEN, timeout=5)


def test_a_silent_stream_is_closed_and_its_session_freed(channel: grpc.Channel) -> None:
    stub = policy_pb2_grpc.PolicyServiceStub(channel)
    opened = policy_pb2.ControlRequest(open=policy_pb2.ControlOpen(session=OPEN))

    def silent() -> Iterator[policy_pb2.ControlRequest]:
        yield opened
        ended.wait(5)

    ended = threading.Event()
    call = stub.Control(silent(), metadata=TOKEN, timeout=5)
    assert next(call).opened.policy_version == 1
    assert stub.CheckHealth(policy_pb2.CheckHealthRequest(), metadata=TOKEN, timeout=5).num_sessions == 1
    with pytest.raises(grpc.RpcError) as caught:
        next(call)
    ended.set()
    assert status(caught)[0] is grpc.StatusCode.UNAVAILABLE
    assert "silent for 0.4 s" in status(caught)[1]
    assert stub.CheckHealth(policy_pb2.CheckHealthRequest(), metadata=TOKEN, timeout=5).num_sessions == 0


def test_a_cancelled_stream_frees_its_session(channel: grpc.Channel) -> None:
    stub = policy_pb2_grpc.PolicyServiceStub(channel)
    requests: queue.SimpleQueue[policy_pb2.ControlRequest | None] = queue.SimpleQueue()
    requests.put(policy_pb2.ControlRequest(open=policy_pb2.ControlOpen(session=OPEN)))
    call = stub.Control(iter(requests.get, None), metadata=TOKEN, timeout=5)
    next(call)
    call.cancel()
    requests.put(None)
    deadline = time.monotonic() + 0.3
    while stub.CheckHealth(policy_pb2.CheckHealthRequest(), metadata=TOKEN, timeout=5).num_sessions:
        assert time.monotonic() < deadline, "the session outlived its stream"
        time.sleep(0.01)


def test_what_a_network_sends_twice_counts_once(server: SingleServer) -> None:
    """Each message twice: one session, one answer to each observation, and the memory moves on once."""
    with grpc.insecure_channel(server.address) as channel:
        control = policy_pb2_grpc.PolicyServiceStub(channel).Control
        sent = [hostile.opening("r"), *(hostile.asking(index) for index in range(5))]
        goodbye = policy_pb2.ControlRequest(goodbye=policy_pb2.ControlGoodbye())
        once = list(control(iter([*sent, goodbye]), metadata=TOKEN, timeout=10))
        twice = list(control(iter([m for m in sent for _ in range(2)] + [goodbye]), metadata=TOKEN, timeout=10))
    assert [r.chunk for r in once] == [r.chunk for r in twice]
    assert [r.chunk.observation_id for r in twice[1:]] == [0, 1, 2, 3, 4]
