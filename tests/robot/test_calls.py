"""Which calls are asked again, how often, and which never."""

import threading
import time
from typing import Any

import grpc
import pytest

from vla_dist.core.errors import DataError, DeadlineExceeded, Unreachable
from vla_dist.robot.calls import call_idempotent
from vla_dist.robot.client import PolicyClient


class Failing(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, details: str = "gone") -> None:
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details


class Method:
    """Fails with these, one after the other; then it answers."""

    def __init__(self, *failures: Failing) -> None:
        self._failures = list(failures)
        self.timeouts: list[float] = []

    def __call__(self, request: Any, *, timeout: float, metadata: Any) -> Any:
        self.timeouts.append(timeout)
        if self._failures:
            raise self._failures.pop(0)
        return request


def call(method: Method, *, timeout_s: float = 10.0) -> Any:
    return call_idempotent(method, "asked", timeout_s=timeout_s, metadata=(), address="here")


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN])
def test_a_server_that_died_is_asked_again_within_the_time_of_the_call(code: grpc.StatusCode) -> None:
    method = Method(Failing(code), Failing(code))
    assert call(method) == "asked"
    assert len(method.timeouts) == 3
    assert 10.0 >= method.timeouts[0] > method.timeouts[1] > method.timeouts[2]


def test_three_times_is_enough() -> None:
    method = Method(*[Failing(grpc.StatusCode.UNAVAILABLE)] * 9)
    with pytest.raises(Unreachable, match="no answer from the server at here"):
        call(method)
    assert len(method.timeouts) == 3
    short = Method(*[Failing(grpc.StatusCode.UNAVAILABLE)] * 9)
    with pytest.raises(Unreachable):
        call(short, timeout_s=0.05)
    assert len(short.timeouts) == 1, "a pause longer than the call's time helps nobody"


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (Failing(grpc.StatusCode.INVALID_ARGUMENT), DataError),
        (Failing(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"), DeadlineExceeded),
        (Failing(grpc.StatusCode.DEADLINE_EXCEEDED, "no action within 100 ms"), DeadlineExceeded),
    ],
)
def test_what_the_server_answered_is_not_asked_again(failure: Failing, error: type[Exception]) -> None:
    method = Method(failure)
    with pytest.raises(error):
        call(method)
    assert len(method.timeouts) == 1


def test_a_restart_of_the_server_is_not_seen_by_a_unary_call(site: Any, client: PolicyClient) -> None:
    assert client.health().num_sessions == 0
    site.kill()
    back = threading.Timer(0.15, site.start)
    back.start()
    # Three attempts pause for 0.3 s at least; the timer may be late on a busy machine.
    deadline = time.monotonic() + 20
    while True:
        try:
            assert client.health().num_sessions == 0
            break
        except Unreachable:
            assert time.monotonic() < deadline
    back.join()
