"""The door of a plain gRPC server: no token, no look at the message; and bytes that are none are the caller's fault.

gRPC by itself answers unreadable bytes with UNKNOWN, which clients take for a broken connection, and logs a traceback
for each.
"""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from vla_dist.core.errors import Unauthorised
from vla_dist.protocol.status import status_of
from vla_dist.serving.authorisation import TokenCheck
from vla_dist.serving.calls import unreadable
from vla_dist.serving.event_log import EventLog

_FACTORIES = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


class Gate(grpc.aio.ServerInterceptor):
    """Looks at a call's metadata, then at whether its messages can be read at all.

    Roles and robots are checked again by each method, which knows the message.
    """

    def __init__(self, tokens: TokenCheck, audit: EventLog) -> None:
        self._tokens = tokens
        self._audit = audit
        self._handlers: dict[str, grpc.RpcMethodHandler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        method = handler_call_details.method
        known = self._handlers.get(method)
        if known is None:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            known = self._handlers[method] = _readable(handler)
        try:
            self._tokens.require(_Metadata(handler_call_details))
        except Unauthorised as error:
            return self._refusing(known, method, error)
        return known

    def _refusing(self, handler: grpc.RpcMethodHandler, method: str, error: Unauthorised) -> grpc.RpcMethodHandler:
        """A handler of the same kind that decodes nothing and ends the call with the refusal's status."""
        code, text = status_of(error)

        async def refuse(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            self._audit.write("refused", error=type(error).__name__, method=method, peer=context.peer(), reason=text)
            await context.abort(code, text)

        return _FACTORIES[bool(handler.request_streaming), bool(handler.response_streaming)](refuse)  # type: ignore[arg-type]


class _Unreadable:
    """What stands for bytes that are no message."""


class _Metadata:
    """Call details as the token check wants to see them."""

    def __init__(self, details: grpc.HandlerCallDetails) -> None:
        self._metadata = details.invocation_metadata

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]] | None:
        return self._metadata


def _readable(handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
    """The handler, with unreadable bytes refused as what they are."""
    decode: Any = handler.request_deserializer
    kind = bool(handler.request_streaming), bool(handler.response_streaming)
    behaviour: Any = handler.stream_stream if handler.request_streaming else handler.unary_unary

    def safely(raw: bytes) -> Any:
        try:
            return decode(raw)
        except DecodeError:
            return _Unreadable

    async def answer_one(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        if request is _Unreadable:
            await context.abort(*status_of(unreadable()))
        return await behaviour(request, context)

    async def answer_stream(
        requests: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[Any]:
        # gRPC tells a stream's handler by its being an async generator itself.
        async with contextlib.aclosing(behaviour(_checked(requests), context)) as responses:
            async for response in responses:
                yield response

    if kind not in ((False, False), (True, True)):
        return handler  # this protocol has none
    wrapped = answer_stream if handler.request_streaming else answer_one
    return _FACTORIES[kind](wrapped, request_deserializer=safely, response_serializer=handler.response_serializer)  # type: ignore[arg-type]


async def _checked(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        if request is _Unreadable:
            raise unreadable()
        yield request
