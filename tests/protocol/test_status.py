"""Errors cross the wire as what they are."""

import grpc
import pytest

from vla_dist.core import errors
from vla_dist.protocol.status import MAX_DETAIL_CHARACTERS, error_of, status_of


@pytest.mark.parametrize(
    "kind",
    [
        errors.ContractMismatch,
        errors.Unauthorised,
        errors.NotFound,
        errors.DataError,
        errors.DeadlineExceeded,
        errors.WaitTimeout,
        errors.ResourceMissing,
        errors.WorkerFailed,
    ],
)
def test_kind_and_sentence_survive(kind: type[errors.VlaDistError]) -> None:
    code, details = status_of(kind("got 3, expected 4"))
    error = error_of(code, details, address="here")
    assert type(error) is kind
    assert str(error) == "got 3, expected 4"


def test_foreign_errors_do_not_leak_their_text() -> None:
    code, details = status_of(KeyError("password=123"))
    assert code is grpc.StatusCode.INTERNAL
    assert "123" not in details
    assert "KeyError" in details


def test_long_details_fit_a_trailer() -> None:
    _, details = status_of(errors.ContractMismatch("x" * 100_000))
    assert len(details) < MAX_DETAIL_CHARACTERS + 100
    assert "96000 more characters" in details


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN])
def test_a_dead_server_is_unreachable(code: grpc.StatusCode) -> None:
    assert isinstance(error_of(code, "gone", address="1.2.3.4:5"), errors.Unreachable)


def test_a_refused_move_keeps_its_sentence() -> None:
    assert status_of(errors.MoveRefused("not yet")) == (grpc.StatusCode.FAILED_PRECONDITION, "not yet")
