"""``FleetService`` as gRPC sees it: segments and heartbeats in, acknowledgements and commands out."""

from collections.abc import AsyncIterator

from vla_dist.protocol.records import AckStatus, FleetCommand
from vla_dist.protocol.v1 import fleet_pb2
from vla_dist.serving.calls import CallContext, TokenCheck, fail_call
from vla_dist.serving.ingest import FleetIngest

_ACKS: dict[AckStatus, fleet_pb2.AckStatus] = {
    "stored": fleet_pb2.ACK_STATUS_STORED,
    "duplicate": fleet_pb2.ACK_STATUS_DUPLICATE,
    "quarantined": fleet_pb2.ACK_STATUS_QUARANTINED,
    "retry": fleet_pb2.ACK_STATUS_RETRY,
}
_COMMANDS: dict[FleetCommand, fleet_pb2.FleetCommand] = {
    "continue": fleet_pb2.FLEET_COMMAND_CONTINUE,
    "drain": fleet_pb2.FLEET_COMMAND_DRAIN,
    "stop": fleet_pb2.FLEET_COMMAND_STOP,
}


class FleetServicer:
    """``vla_dist.v1.FleetService`` over one FleetIngest."""

    def __init__(self, ingest: FleetIngest, tokens: TokenCheck) -> None:
        self._ingest = ingest
        self._fleet_tokens = tokens

    async def Upload(  # noqa: N802
        self, request_iterator: AsyncIterator[fleet_pb2.UploadRequest], grpc_context: CallContext
    ) -> AsyncIterator[fleet_pb2.UploadResponse]:
        try:
            self._fleet_tokens.require(grpc_context)
            async for request in request_iterator:
                ack = await self._ingest.receive(request.segment)
                yield fleet_pb2.UploadResponse(
                    episode_id=ack.episode_id,
                    segment_index=ack.segment_index,
                    status=_ACKS[ack.status],
                    reason=ack.reason,
                )
        except Exception as error:  # noqa: BLE001 - the edge: every error becomes a status
            fail_call(grpc_context, error, fleet_pb2.UploadResponse)

    async def Heartbeat(  # noqa: N802
        self, request: fleet_pb2.HeartbeatRequest, grpc_context: CallContext
    ) -> fleet_pb2.HeartbeatResponse:
        try:
            self._fleet_tokens.require(grpc_context)
            command = self._ingest.heartbeat(request.robot_id, request.counters)
            return fleet_pb2.HeartbeatResponse(command=_COMMANDS[command])
        except Exception as error:  # noqa: BLE001 - the edge: every error becomes a status
            return fail_call(grpc_context, error, fleet_pb2.HeartbeatResponse)
