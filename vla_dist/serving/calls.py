"""What every gRPC method of the services shares: who calls, and how an error becomes a status.

The same methods serve a plain ``grpc.aio`` server and Ray Serve's gRPC ingress. Serve hands over a context that has
neither ``abort`` nor interceptors, so a failed call sets code and details and returns: both runtimes send them, and
neither logs a traceback for a robot's mistake.
"""

import hmac
import logging
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

import grpc

from vla_dist.core.errors import Unauthorised
from vla_dist.protocol.status import status_of

_log = logging.getLogger(__name__)

M = TypeVar("M")


class CallContext(Protocol):
    """What ``grpc.aio.ServicerContext`` and Serve's ``RayServegRPCContext`` have in common."""

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...

    def set_code(self, code: grpc.StatusCode) -> None: ...

    def set_details(self, details: str) -> None: ...


class TokenCheck:
    """The bearer token, compared before any array of a message is decoded. None lets everybody in."""

    def __init__(self, token: str | None) -> None:
        self._expected = None if token is None else f"Bearer {token}".encode()

    def require(self, context: CallContext) -> None:
        """Raises Unauthorised unless the call's metadata has ``authorization: Bearer <token>``."""
        if self._expected is None:
            return
        for key, value in context.invocation_metadata() or ():
            if key == "authorization":
                got = value.encode() if isinstance(value, str) else value
                if hmac.compare_digest(got, self._expected):
                    return
                raise Unauthorised("the bearer token is not this server's; check the token the robot was given")
        raise Unauthorised("the call has no bearer token; send metadata 'authorization: Bearer <token>'")


def fail_call(context: CallContext, error: Exception, response: Callable[..., M]) -> M:
    """Set the status of a failed call; the empty response beside it is ignored by every client."""
    code, details = status_of(error)
    if code is grpc.StatusCode.INTERNAL:
        _log.error("a call failed in the server", exc_info=error)
    context.set_code(code)
    context.set_details(details)
    return response()
