"""The exception tree as gRPC status codes, and back: an error crosses the wire as its kind and its whole sentence."""

import grpc

from vla_dist.core.errors import (
    ContractMismatch,
    DataError,
    DeadlineExceeded,
    Forbidden,
    MoveRefused,
    NotFound,
    ResourceMissing,
    Unauthorised,
    Unreachable,
    VlaDistError,
    WaitTimeout,
    WorkerFailed,
)

MAX_DETAIL_CHARACTERS = 4000
"""Details travel in an HTTP/2 trailer, and peers refuse trailers above 8 KiB."""

_CODES: tuple[tuple[type[VlaDistError], grpc.StatusCode], ...] = (
    (MoveRefused, grpc.StatusCode.FAILED_PRECONDITION),
    (ContractMismatch, grpc.StatusCode.FAILED_PRECONDITION),
    (Forbidden, grpc.StatusCode.PERMISSION_DENIED),
    (Unauthorised, grpc.StatusCode.UNAUTHENTICATED),
    (NotFound, grpc.StatusCode.NOT_FOUND),
    (DataError, grpc.StatusCode.INVALID_ARGUMENT),
    (DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (WaitTimeout, grpc.StatusCode.ABORTED),
    (ResourceMissing, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (Unreachable, grpc.StatusCode.UNAVAILABLE),
    (WorkerFailed, grpc.StatusCode.INTERNAL),
)
_ERRORS = {code: error for error, code in _CODES}
"""Of two kinds with one code the last: what a robot's calls raise."""

RETRYABLE_CODES = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN})
"""How the death of a server or proxy shows: which of the three depends on who noticed first."""


def status_of(error: BaseException) -> tuple[grpc.StatusCode, str]:
    """Code and sentence to send. What is not ours is INTERNAL with its type alone: its text may hold secrets."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code, _shortened(str(error))
    if isinstance(error, VlaDistError):
        return grpc.StatusCode.INTERNAL, _shortened(str(error))
    return grpc.StatusCode.INTERNAL, f"the server failed with {type(error).__name__}; its log has the traceback"


def error_of(code: grpc.StatusCode | None, details: str | None, *, address: str) -> VlaDistError:
    """The error that a client raises for a status; the caller adds the cause with ``from``."""
    text = details or f"the server at {address} answered {code.name if code else 'nothing'} without a reason"
    if code in RETRYABLE_CODES or code is None:
        return Unreachable(f"no answer from the server at {address} ({text}); check that it runs there")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return NotFound(f"the server at {address} does not offer this call ({text}); is it a vla-dist server?")
    return _ERRORS.get(code, WorkerFailed)(text)


def _shortened(text: str) -> str:
    if len(text) <= MAX_DETAIL_CHARACTERS:
        return text
    return f"{text[:MAX_DETAIL_CHARACTERS]}... ({len(text) - MAX_DETAIL_CHARACTERS} more characters)"
