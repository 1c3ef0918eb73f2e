"""Ten thousand hostile messages: each gets a clear status, the server lives, and other robots notice nothing."""

import gc
import os
from collections.abc import Iterator

import grpc
import psutil
import pytest

from vla_dist.protocol.v1 import policy_pb2
from vla_dist.serving.server import SingleServer
from vla_dist.testing import hostile
from vla_dist.testing.attack import SERVICE, Bystander, attack, codes_of_a_stranger, codes_of_reflection
from vla_dist.testing.registry import InMemoryRegistry, fake_artifact
from vla_dist.testing.serving import build_service


@pytest.fixture
def server() -> Iterator[SingleServer]:
    registry = InMemoryRegistry()
    registry.publish(fake_artifact(hostile.SPEC, bias=0.1), channel="stable")
    with SingleServer(build_service(registry), max_message_bytes=2**20) as server:
        yield server


@pytest.mark.parametrize(
    ("num_unary", "num_streams"),
    [(1000, 150), pytest.param(9000, 2500, marks=pytest.mark.chaos)],
    ids=["short", "long"],
)
def test_hostile_messages_hurt_nobody(server: SingleServer, num_unary: int, num_streams: int) -> None:
    attack(server.address, num_unary=200, num_streams=20, seed=0)
    gc.collect()
    before = psutil.Process(os.getpid()).memory_info().rss
    with Bystander(server.address) as bystander:
        codes = attack(server.address, num_unary=num_unary, num_streams=num_streams, seed=1)
    gc.collect()
    grown = psutil.Process(os.getpid()).memory_info().rss - before
    assert bystander.failures == []
    assert bystander.num_answers > 5
    assert codes[grpc.StatusCode.INVALID_ARGUMENT] > num_unary / 10, codes
    assert grown < 40 * 2**20, f"{grown / 2**20:.0f} MiB more after {sum(codes.values())} calls"
    assert server.service is not None
    assert server.service.health().num_sessions == 0


def test_a_message_above_the_limit_is_refused_before_it_is_read(server: SingleServer) -> None:
    request = hostile.act_request()
    request.observation.proprio.data = bytes(2 * 2**20)
    with grpc.insecure_channel(server.address) as channel:
        act = channel.unary_unary(f"{SERVICE}/Act", request_serializer=policy_pb2.ActRequest.SerializeToString)
        with pytest.raises(grpc.RpcError) as caught:
            act(request, timeout=10)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_nothing_is_decoded_of_a_caller_without_a_token() -> None:
    registry = InMemoryRegistry()
    registry.publish(fake_artifact(hostile.SPEC), channel="stable")
    with SingleServer(build_service(registry), token="secret") as server:
        assert codes_of_a_stranger(server.address) == {grpc.StatusCode.UNAUTHENTICATED}


def test_reflection_is_off(server: SingleServer) -> None:
    assert codes_of_reflection(server.address) == {grpc.StatusCode.UNIMPLEMENTED}
