"""The connection under one session: the client's own, until that one is silent; then a new one."""

from collections.abc import Callable, Iterator
from typing import Any

import grpc

from vla_dist.protocol.v1 import policy_pb2, policy_pb2_grpc


class ControlCalls:
    """Starts Control calls.

    A connection that was cut without a word keeps its calls waiting: the kernel sends again after ever longer pauses,
    minutes in the end, while a new connection would be through at once.

    Args:
        channel: shared with the client's other sessions; never closed here.
        make_channel: a new connection to the same server.
        metadata: of each call.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        make_channel: Callable[[], grpc.Channel],
        metadata: tuple[tuple[str, str], ...],
    ) -> None:
        self._make_channel = make_channel
        self._metadata = metadata
        self._own: grpc.Channel | None = None
        self._stub = policy_pb2_grpc.PolicyServiceStub(channel)

    def start(self, requests: Iterator[policy_pb2.ControlRequest]) -> Any:
        """gRPC's call object."""
        return self._stub.Control(requests, metadata=self._metadata)

    def use_new_connection(self) -> None:
        """What runs on the last one of this session's own is cancelled; the client's goes on for others."""
        self.close()
        self._own = self._make_channel()
        self._stub = policy_pb2_grpc.PolicyServiceStub(self._own)

    def close(self) -> None:
        if self._own is not None:
            self._own.close()
            self._own = None
