"""The channels of a service from afar: what ``ChannelMoves`` promises, by gRPC.

No call is made twice by itself: a promotion whose answer was lost may have happened, and the next look tells.
"""

from collections.abc import Callable
from typing import Any

import grpc

from vla_dist.core.errors import MoveRefused
from vla_dist.protocol.status import error_of
from vla_dist.protocol.v1 import channels_pb2, channels_pb2_grpc
from vla_dist.registry.canary_plan import CanaryPlan
from vla_dist.registry.channel_moves import ChannelReport
from vla_dist.registry.sequential import CanaryRule
from vla_dist.serving.channel_conversion import decode_entry, decode_plan, decode_report, encode_rule

_TIMEOUT_S = 10.0


class ChannelClient:
    """Implements ``ChannelMoves`` over a connection that stays the caller's.

    Every call also raises Unauthorised or Forbidden where the token has not the role, and Unreachable. ``who`` is
    written beside the name of the token.

    Args:
        metadata: of each call, with the bearer token.
    """

    def __init__(self, channel: grpc.Channel, *, address: str, metadata: tuple[tuple[str, str], ...]) -> None:
        self._stub = channels_pb2_grpc.ChannelServiceStub(channel)
        self._address = address
        self._metadata = metadata

    def reports(self, name: str = "") -> list[ChannelReport]:
        request = channels_pb2.DescribeChannelsRequest(name=name)
        return [decode_report(report) for report in self._call(self._stub.DescribeChannels, request).reports]

    def audit(self, max_entries: int) -> list[dict[str, Any]]:
        request = channels_pb2.DescribeChannelsRequest(max_audit_entries=max(0, max_entries))
        return [decode_entry(entry) for entry in self._call(self._stub.DescribeChannels, request).audit]

    def begin_canary(self, reference: str, *, share: float, rule: CanaryRule, who: str) -> CanaryPlan:
        request = channels_pb2.BeginCanaryRequest(
            reference=reference, share=share, rule=encode_rule(rule), operator=who
        )
        return decode_plan(self._call(self._stub.BeginCanary, request).plan)

    def promote(self, reference: str, *, force: str = "", who: str) -> tuple[int, str]:
        request = channels_pb2.PromoteRequest(reference=reference, force=force, operator=who)
        answer = self._call(self._stub.Promote, request)
        return answer.version, answer.reason

    def set_shadow(self, reference: str, *, who: str) -> int:
        request = channels_pb2.SetShadowRequest(reference=reference, operator=who)
        return self._call(self._stub.SetShadow, request).version

    def roll_back(self, name: str, *, reason: str, who: str) -> str:
        request = channels_pb2.RollBackRequest(name=name, reason=reason, operator=who)
        return self._call(self._stub.RollBack, request).done

    def _call(self, method: Callable[..., Any], request: Any) -> Any:
        try:
            return method(request, timeout=_TIMEOUT_S, metadata=self._metadata)
        except grpc.RpcError as error:
            failure: Any = error
            if failure.code() is grpc.StatusCode.FAILED_PRECONDITION:
                raise MoveRefused(failure.details()) from error
            raise error_of(failure.code(), failure.details(), address=self._address) from error
