"""The door of a plain gRPC server: a caller without a token is turned away before its message is read."""

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import grpc

from vla_dist.core.errors import Unauthorised
from vla_dist.protocol.status import status_of
from vla_dist.serving.authorisation import TokenCheck
from vla_dist.serving.event_log import EventLog


class Gate(grpc.aio.ServerInterceptor):
    """Looks at a call's metadata alone. Roles and robots are checked again by each method, which knows the message."""

    def __init__(self, tokens: TokenCheck, audit: EventLog) -> None:
        self._tokens = tokens
        self._audit = audit

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        try:
            self._tokens.require(_Metadata(handler_call_details))
        except Unauthorised as error:
            handler = await continuation(handler_call_details)
            return None if handler is None else self._refusing(handler, handler_call_details, error)
        return await continuation(handler_call_details)

    def _refusing(
        self, handler: grpc.RpcMethodHandler, details: grpc.HandlerCallDetails, error: Unauthorised
    ) -> grpc.RpcMethodHandler:
        """A handler of the same kind that decodes nothing and ends the call with the refusal's status."""
        code, text = status_of(error)

        async def refuse(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            self._audit.write(
                "refused", error=type(error).__name__, method=details.method, peer=context.peer(), reason=text
            )
            await context.abort(code, text)

        kinds = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }
        return kinds[bool(handler.request_streaming), bool(handler.response_streaming)](refuse)  # type: ignore[arg-type]


class _Metadata:
    """Call details as the token check wants to see them."""

    def __init__(self, details: grpc.HandlerCallDetails) -> None:
        self._metadata = details.invocation_metadata

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]] | None:
        return self._metadata
