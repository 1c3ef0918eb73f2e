"""Requests under Ray Serve: bytes, until it is known who sent them.

Serve has no interceptors, and its gRPC server decodes every request before anybody can look at the caller; what it
cannot decode it answers with UNKNOWN, which clients take for a dead server. So its servers are told to decode nothing
(``add_policies`` and its like stand in Serve's config), and ``decodes_after_the_token`` has the replica do it.
"""

import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.descriptor import FileDescriptor, MethodDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from vla_dist.core.errors import Unauthorised, VlaDistError
from vla_dist.protocol.v1 import channels_pb2_grpc, fleet_pb2_grpc, policy_pb2_grpc
from vla_dist.serving.authorisation import TokenCheck
from vla_dist.serving.calls import CallContext, fail_call, note_refusal, unreadable
from vla_dist.serving.event_log import EventLog

C = TypeVar("C", bound="type[HasDoor]")


class HasDoor(Protocol):
    """What a servicer must have to be guarded."""

    door: TokenCheck
    door_audit: EventLog


def add_policies(servicer: Any, server: Any) -> None:
    policy_pb2_grpc.add_PolicyServiceServicer_to_server(servicer, _Undecoded(server))


def add_fleet(servicer: Any, server: Any) -> None:
    fleet_pb2_grpc.add_FleetServiceServicer_to_server(servicer, _Undecoded(server))


def add_channels(servicer: Any, server: Any) -> None:
    channels_pb2_grpc.add_ChannelServiceServicer_to_server(servicer, _Undecoded(server))


class _Undecoded:
    """A gRPC server as generated code sees it; services are added with their requests left as bytes."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Made anew in the next call, which names the service and its methods."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        raw = {name: handler._replace(request_deserializer=None) for name, handler in handlers.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, raw),))
        self._server.add_registered_method_handlers(service, raw)


def decodes_after_the_token(*files: FileDescriptor) -> Callable[[C], C]:
    """A class whose methods of these files' services take messages becomes one whose methods take bytes."""

    def guard(servicer: C) -> C:
        for file in files:
            for service in file.services_by_name.values():
                for method in service.methods:
                    guarded = _guarded_stream if method.client_streaming else _guarded_call
                    setattr(servicer, method.name, guarded(getattr(servicer, method.name), method))
        return servicer

    return guard


def _guarded_call(behaviour: Callable[..., Awaitable[Any]], method: MethodDescriptor) -> Callable[..., Any]:
    request_class, response_class = GetMessageClass(method.input_type), GetMessageClass(method.output_type)

    @functools.wraps(behaviour)
    async def answer(self: HasDoor, raw: bytes, grpc_context: CallContext) -> Any:
        try:
            self.door.require(grpc_context)
            request = _decoded(request_class, raw)
        except VlaDistError as error:
            return _refuse(self, grpc_context, error, response_class)
        return await behaviour(self, request, grpc_context)

    return answer


def _guarded_stream(behaviour: Callable[..., AsyncIterator[Any]], method: MethodDescriptor) -> Callable[..., Any]:
    request_class, response_class = GetMessageClass(method.input_type), GetMessageClass(method.output_type)

    @functools.wraps(behaviour)
    async def answer(
        self: HasDoor, request_iterator: AsyncIterator[bytes], grpc_context: CallContext
    ) -> AsyncIterator[Any]:
        try:
            self.door.require(grpc_context)
        except Unauthorised as error:
            _refuse(self, grpc_context, error, response_class)
            return
        requests = (_decoded(request_class, raw) async for raw in request_iterator)
        async with contextlib.aclosing(behaviour(self, requests, grpc_context)) as responses:  # type: ignore[type-var]
            async for response in responses:
                yield response

    return answer


def _decoded(kind: type[Message], raw: bytes) -> Message:
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        raise unreadable() from error


def _refuse(servicer: HasDoor, context: CallContext, error: VlaDistError, response: Callable[..., Any]) -> Any:
    if isinstance(error, Unauthorised):
        note_refusal(servicer.door_audit, context, error)
    return fail_call(context, error, response)
