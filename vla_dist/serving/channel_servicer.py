"""``ChannelService`` as gRPC sees it: who may move a channel is asked here, whether it may be moved in the registry."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from vla_dist.core.errors import ConfigError, DataError, MoveRefused, NotFound, Unauthorised
from vla_dist.protocol.v1 import channels_pb2
from vla_dist.registry.channel_moves import ChannelMoves
from vla_dist.serving.authorisation import Caller, Role, TokenCheck
from vla_dist.serving.calls import CallContext, fail_call, note_refusal
from vla_dist.serving.channel_conversion import decode_rule, encode_entry, encode_plan, encode_report
from vla_dist.serving.event_log import EventLog

M = TypeVar("M")
T = TypeVar("T")

_MAX_TEXT_CHARACTERS = 1000
_MAX_AUDIT_ENTRIES = 1000


class ChannelServicer:
    """``vla_dist.v1.ChannelService`` over a registry's channels.

    Args:
        moves: None: the channels of this service are not to be moved from afar.
        audit: where refused callers go; moves are in the registry's own log.
    """

    def __init__(self, moves: ChannelMoves | None, tokens: TokenCheck, *, audit: EventLog | None = None) -> None:
        self._moves = moves
        self._channel_tokens = tokens
        self._channel_audit = audit or EventLog(None)

    async def DescribeChannels(  # noqa: N802
        self, request: channels_pb2.DescribeChannelsRequest, grpc_context: CallContext
    ) -> channels_pb2.DescribeChannelsResponse:
        def describe(moves: ChannelMoves, caller: Caller) -> channels_pb2.DescribeChannelsResponse:
            reports = moves.reports(_text("name", request.name))
            entries = moves.audit(min(request.max_audit_entries, _MAX_AUDIT_ENTRIES))
            return channels_pb2.DescribeChannelsResponse(
                reports=map(encode_report, reports), audit=map(encode_entry, entries)
            )

        return await self._call(grpc_context, "operator", describe, channels_pb2.DescribeChannelsResponse)

    async def BeginCanary(  # noqa: N802
        self, request: channels_pb2.BeginCanaryRequest, grpc_context: CallContext
    ) -> channels_pb2.BeginCanaryResponse:
        def begin(moves: ChannelMoves, caller: Caller) -> channels_pb2.BeginCanaryResponse:
            plan = moves.begin_canary(
                _text("reference", request.reference),
                share=request.share,
                rule=decode_rule(request.rule),
                who=_who(caller, request.operator),
            )
            return channels_pb2.BeginCanaryResponse(plan=encode_plan(plan))

        return await self._call(grpc_context, "admin", begin, channels_pb2.BeginCanaryResponse)

    async def Promote(  # noqa: N802
        self, request: channels_pb2.PromoteRequest, grpc_context: CallContext
    ) -> channels_pb2.PromoteResponse:
        def promote(moves: ChannelMoves, caller: Caller) -> channels_pb2.PromoteResponse:
            version, reason = moves.promote(
                _text("reference", request.reference),
                force=_text("force", request.force),
                who=_who(caller, request.operator),
            )
            return channels_pb2.PromoteResponse(version=version, reason=reason)

        return await self._call(grpc_context, "admin", promote, channels_pb2.PromoteResponse)

    async def SetShadow(  # noqa: N802
        self, request: channels_pb2.SetShadowRequest, grpc_context: CallContext
    ) -> channels_pb2.SetShadowResponse:
        def shadow(moves: ChannelMoves, caller: Caller) -> channels_pb2.SetShadowResponse:
            version = moves.set_shadow(_text("reference", request.reference), who=_who(caller, request.operator))
            return channels_pb2.SetShadowResponse(version=version)

        return await self._call(grpc_context, "admin", shadow, channels_pb2.SetShadowResponse)

    async def RollBack(  # noqa: N802
        self, request: channels_pb2.RollBackRequest, grpc_context: CallContext
    ) -> channels_pb2.RollBackResponse:
        def roll_back(moves: ChannelMoves, caller: Caller) -> channels_pb2.RollBackResponse:
            done = moves.roll_back(
                _text("name", request.name), reason=_text("reason", request.reason), who=_who(caller, request.operator)
            )
            return channels_pb2.RollBackResponse(done=done)

        return await self._call(grpc_context, "admin", roll_back, channels_pb2.RollBackResponse)

    async def _call(
        self,
        context: CallContext,
        role: Role,
        act: Callable[[ChannelMoves, Caller], M],
        response: Callable[..., M],
    ) -> M:
        try:
            caller = self._channel_tokens.require(context, role=role)
            if self._moves is None:
                raise NotFound("this service's channels are moved where its registry is, not from here")
            # The registry blocks; robots' streams go on meanwhile.
            return await asyncio.get_running_loop().run_in_executor(None, partial(act, self._moves, caller))
        except Exception as error:  # noqa: BLE001 - the edge: every error becomes a status
            if isinstance(error, Unauthorised | MoveRefused):
                note_refusal(self._channel_audit, context, error)
            elif isinstance(error, ConfigError):
                error = DataError(str(error))
            return fail_call(context, error, response)


def _who(caller: Caller, operator: str) -> str:
    """The token's name, and how the person behind it calls itself."""
    claimed = _text("operator", operator)
    return f"{caller.name} ({claimed})" if claimed else caller.name


def _text(label: str, text: str) -> str:
    if len(text) > _MAX_TEXT_CHARACTERS:
        raise DataError(f"{label} has {len(text)} characters, expected at most {_MAX_TEXT_CHARACTERS}")
    return text
