"""What every gRPC method of the services shares: the call's context, and how an error becomes a status.

The same methods serve a plain ``grpc.aio`` server and Ray Serve's gRPC ingress. Serve hands over a context that has
neither ``abort`` nor interceptors, so a failed call sets code and details and returns: both runtimes send them, and
neither logs a traceback for a robot's mistake.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

import grpc

from vla_dist.core.errors import DataError
from vla_dist.protocol.status import status_of
from vla_dist.serving.event_log import EventLog

_log = logging.getLogger(__name__)

M = TypeVar("M")


class CallContext(Protocol):
    """What ``grpc.aio.ServicerContext`` and Serve's ``RayServegRPCContext`` have in common."""

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...

    def peer(self) -> str: ...

    def set_code(self, code: grpc.StatusCode) -> None: ...

    def set_details(self, details: str) -> None: ...


def fail_call(context: CallContext, error: Exception, response: Callable[..., M]) -> M:
    """Set the status of a failed call; the empty response beside it is ignored by every client."""
    code, details = status_of(error)
    if code is grpc.StatusCode.INTERNAL:
        _log.error("a call failed in the server", exc_info=error)
    context.set_code(code)
    context.set_details(details)
    return response()


def note_refusal(audit: EventLog, context: CallContext, error: Exception) -> None:
    """Who was refused, from where and why, into the audit log."""
    audit.write("refused", error=type(error).__name__, peer=context.peer(), reason=status_of(error)[1][:500])


def unreadable() -> DataError:
    """Of bytes that are no message."""
    return DataError("the bytes are no message of this protocol; generate the client from the server's .proto files")
