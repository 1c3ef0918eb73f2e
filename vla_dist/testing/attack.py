"""An attack with hostile messages on a server, and the honest robot beside it."""

import random
import threading
import time
from collections import Counter

import grpc

from vla_dist.robot.client import PolicyClient
from vla_dist.testing import hostile
from vla_dist.testing.fakes import FakeEnv
from vla_dist.testing.serving import REFERENCE

SERVICE = "/vla_dist.v1.PolicyService"
ALLOWED = frozenset(
    {
        grpc.StatusCode.OK,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNAVAILABLE,  # an episode that belongs to another service
        grpc.StatusCode.UNAUTHENTICATED,
    }
)


class Bystander:
    """An honest robot beside it all: every answer must come, and be right."""

    def __init__(self, address: str, *, token: str | None = None) -> None:
        self._token = token
        self.failures: list[object] = []
        self.num_answers = 0
        self._stop = threading.Event()
        self._address = address
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Bystander":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join(20)

    def _run(self) -> None:
        observation = FakeEnv(hostile.SPEC).reset(seed=1, task="go").observation
        try:
            with (
                PolicyClient(self._address, token=self._token) as client,
                client.open_session(hostile.SPEC, policy=REFERENCE, robot_id="honest") as session,
            ):
                while not self._stop.is_set():
                    session.act(observation, deadline_s=5.0)
                    self.num_answers += 1
                    time.sleep(0.02)
                assert session.metrics()["reconnects"] == 0
        except Exception as error:  # noqa: BLE001 - whatever it was, the test must hear of it
            self.failures.append(error)


def attack(
    address: str,
    *,
    num_unary: int,
    num_streams: int,
    seed: int,
    token: str = "",
    allowed: frozenset[grpc.StatusCode] = ALLOWED,
) -> Counter[grpc.StatusCode]:
    """Codes of all calls; fails at the first that is not allowed."""
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    rng = random.Random(seed)
    codes: Counter[grpc.StatusCode] = Counter()
    same = {"request_serializer": lambda raw: raw, "response_deserializer": lambda raw: raw}
    with grpc.insecure_channel(address) as channel:
        methods = {name: channel.unary_unary(f"{SERVICE}/{name}", **same) for name in hostile.METHODS}
        control = channel.stream_stream(f"{SERVICE}/Control", **same)
        for method, raw in hostile.unary_calls(rng, num_unary):
            try:
                methods[method](raw, timeout=10, metadata=metadata)
                codes[grpc.StatusCode.OK] += 1
            except grpc.RpcError as error:
                codes[_checked(error, allowed, method, raw)] += 1
        for messages in hostile.streams(rng, num_streams):
            try:
                for _ in control(iter(messages), timeout=10, metadata=metadata):
                    codes[grpc.StatusCode.OK] += 1
            except grpc.RpcError as error:
                codes[_checked(error, allowed, "Control", messages[-1])] += 1
    return codes


def _checked(error: grpc.RpcError, allowed: frozenset[grpc.StatusCode], method: str, raw: bytes) -> grpc.StatusCode:
    code, details = error.code(), error.details() or ""  # type: ignore[attr-defined]
    assert code in allowed, (method, code, details, raw[:200])
    assert code is not grpc.StatusCode.DEADLINE_EXCEEDED or "Deadline Exceeded" not in details, (method, raw[:200])
    return code


def codes_of_a_stranger(address: str, *, timeout_s: float = 20.0) -> set[grpc.StatusCode]:
    """Of a call and of a stream without a token, with bytes that no parser takes: an answer about the token shows that
    none was asked."""
    same = {"request_serializer": lambda raw: raw, "response_deserializer": lambda raw: raw}
    codes = set()
    with grpc.insecure_channel(address) as channel:
        for call in (
            lambda: channel.unary_unary(f"{SERVICE}/Act", **same)(b"\xff" * 50, timeout=timeout_s),
            lambda: list(channel.stream_stream(f"{SERVICE}/Control", **same)(iter([b"\xff" * 50]), timeout=timeout_s)),
        ):
            try:
                call()
                codes.add(grpc.StatusCode.OK)
            except grpc.RpcError as error:
                codes.add(error.code())  # type: ignore[attr-defined]
    return codes


def codes_of_reflection(address: str, *, token: str = "", timeout_s: float = 20.0) -> set[grpc.StatusCode]:
    """What a server answers that is asked to describe itself."""
    same = {"request_serializer": lambda raw: raw, "response_deserializer": lambda raw: raw}
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    codes = set()
    with grpc.insecure_channel(address) as channel:
        for version in ("v1", "v1alpha"):
            reflect = channel.stream_stream(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo", **same)
            try:
                list(reflect(iter([b""]), timeout=timeout_s, metadata=metadata))
                codes.add(grpc.StatusCode.OK)
            except grpc.RpcError as error:
                codes.add(error.code())  # type: ignore[attr-defined]
    return codes
