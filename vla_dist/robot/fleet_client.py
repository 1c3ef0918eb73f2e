"""The fleet's service as a robot calls it: what to do next, who lives, what the server lacks."""

import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vla_dist.core.types import Source
from vla_dist.protocol.fleet_conversion import decode_command, decode_next_task, encode_claim, encode_sources
from vla_dist.protocol.fleet_records import NextTask, RobotClaim
from vla_dist.protocol.records import FleetCommand
from vla_dist.protocol.v1 import fleet_pb2, fleet_pb2_grpc
from vla_dist.robot.calls import call_idempotent
from vla_dist.robot.client import PolicyClient

_UPLOAD = "/vla_dist.v1.FleetService/Upload"


class FleetClient:
    """Calls over the connection of a PolicyClient, which stays the caller's."""

    def __init__(self, client: PolicyClient, *, robot_id: str, spool_id: str) -> None:
        self.claim = RobotClaim(robot_id=robot_id, spool_id=spool_id, host=socket.gethostname())
        self.address = client.address
        self._client = client
        self._stub = fleet_pb2_grpc.FleetServiceStub(client.channel)
        # Requests lie serialised in the spool.
        self._upload: Callable[..., Any] = client.channel.stream_stream(
            _UPLOAD, request_serializer=None, response_deserializer=fleet_pb2.UploadResponse.FromString
        )

    def next_task(self, *, tasks: Sequence[str] = (), sources: Sequence[Source] = ()) -> NextTask:
        """What to do now. Raises Unauthorised where another robot goes by this one's id, Unreachable, ..."""
        request = fleet_pb2.NextTaskRequest(
            claim=encode_claim(self.claim), tasks=tasks, sources=encode_sources(sources)
        )
        return decode_next_task(self._call(self._stub.NextTask, request))

    def heartbeat(
        self, counters: Mapping[str, float], *, lease_id: str = "", returned_lease_id: str = ""
    ) -> FleetCommand:
        """Say that the robot lives, renew its lease, and give one back for which nothing was recorded."""
        request = fleet_pb2.HeartbeatRequest(
            robot_id=self.claim.robot_id,
            counters=dict(counters),
            claim=encode_claim(self.claim),
            lease_id=lease_id,
            returned_lease_id=returned_lease_id,
        )
        return decode_command(self._call(self._stub.Heartbeat, request).command)

    def find_missing(self, episode_ids: Sequence[str]) -> list[str]:
        """Those that the server does not hold whole."""
        if not episode_ids:
            return []
        request = fleet_pb2.FindMissingRequest(episode_ids=episode_ids)
        return list(self._call(self._stub.FindMissing, request).episode_ids)

    def upload(self, requests: Any) -> Any:
        """Starts a stream of serialised ``UploadRequest``; the call gives ``UploadResponse``."""
        return self._upload(requests, metadata=self._client.call_metadata)

    def _call(self, method: Any, request: Any) -> Any:
        return call_idempotent(
            method,
            request,
            timeout_s=self._client.timeout_s,
            metadata=self._client.call_metadata,
            address=self.address,
        )
