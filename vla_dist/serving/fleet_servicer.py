"""``FleetService`` as gRPC sees it: segments and heartbeats in, acknowledgements, assignments and commands out."""

from collections.abc import AsyncIterator, Callable
from typing import TypeVar

from vla_dist.core.errors import DataError, Unauthorised
from vla_dist.protocol.fleet_conversion import ACKS, COMMANDS, decode_claim, decode_sources, encode_next_task
from vla_dist.protocol.v1 import fleet_pb2
from vla_dist.serving.authorisation import TokenCheck
from vla_dist.serving.calls import CallContext, fail_call, note_refusal
from vla_dist.serving.event_log import EventLog
from vla_dist.serving.ingest import FleetIngest

M = TypeVar("M")

_MAX_TASKS = 1024


class FleetServicer:
    """``vla_dist.v1.FleetService`` over one FleetIngest.

    Args:
        audit: where refused callers go; None: the process's log.
    """

    def __init__(self, ingest: FleetIngest, tokens: TokenCheck, *, audit: EventLog | None = None) -> None:
        self._ingest = ingest
        self._fleet_tokens = tokens
        self._fleet_audit = audit or EventLog(None)

    async def Upload(  # noqa: N802
        self, request_iterator: AsyncIterator[fleet_pb2.UploadRequest], grpc_context: CallContext
    ) -> AsyncIterator[fleet_pb2.UploadResponse]:
        try:
            caller = self._fleet_tokens.require(grpc_context)
            claim = None
            async for request in request_iterator:
                if request.HasField("claim"):
                    claim = decode_claim(request.claim)
                    caller.require_robot(claim.robot_id)
                    await self._ingest.claim(claim)
                if not request.HasField("segment"):
                    continue
                caller.require_robot(request.segment.robot_id)
                ack = await self._ingest.receive(request, claim=claim)
                yield fleet_pb2.UploadResponse(
                    episode_id=ack.episode_id,
                    segment_index=ack.segment_index,
                    status=ACKS[ack.status],
                    reason=ack.reason,
                )
        except Exception as error:  # noqa: BLE001 - the edge: every error becomes a status
            self._refuse(grpc_context, error, fleet_pb2.UploadResponse)

    async def NextTask(  # noqa: N802
        self, request: fleet_pb2.NextTaskRequest, grpc_context: CallContext
    ) -> fleet_pb2.NextTaskResponse:
        try:
            caller = self._fleet_tokens.require(grpc_context)
            caller.require_robot(request.claim.robot_id)
            if len(request.tasks) > _MAX_TASKS:
                raise DataError(f"the robot names {len(request.tasks)} tasks, expected at most {_MAX_TASKS}")
            answer = await self._ingest.next_task(
                decode_claim(request.claim), tasks=tuple(request.tasks), sources=decode_sources(request.sources)
            )
            return encode_next_task(answer)
        except Exception as error:  # noqa: BLE001 - the edge: every error becomes a status
            return self._refuse(grpc_context, error, fleet_pb2.NextTaskResponse)

    async def FindMissing(  # noqa: N802
        self, request: fleet_pb2.FindMissingRequest, grpc_context: CallContext
    ) -> fleet_pb2.FindMissingResponse:
        try:
            self._fleet_tokens.require(grpc_context)
            missing = await self._ingest.find_missing(tuple(request.episode_ids))
            return fleet_pb2.FindMissingResponse(episode_ids=missing)
        except Exception as error:  # noqa: BLE001 - the edge: every error becomes a status
            return self._refuse(grpc_context, error, fleet_pb2.FindMissingResponse)

    async def Heartbeat(  # noqa: N802
        self, request: fleet_pb2.HeartbeatRequest, grpc_context: CallContext
    ) -> fleet_pb2.HeartbeatResponse:
        try:
            caller = self._fleet_tokens.require(grpc_context)
            caller.require_robot(request.robot_id)
            claim = decode_claim(request.claim) if request.HasField("claim") else None
            command = await self._ingest.heartbeat(
                request.robot_id,
                request.counters,
                claim=claim,
                lease_id=request.lease_id,
                returned_lease_id=request.returned_lease_id,
            )
            return fleet_pb2.HeartbeatResponse(command=COMMANDS[command])
        except Exception as error:  # noqa: BLE001 - the edge: every error becomes a status
            return self._refuse(grpc_context, error, fleet_pb2.HeartbeatResponse)

    def _refuse(self, context: CallContext, error: Exception, response: Callable[..., M]) -> M:
        if isinstance(error, Unauthorised):
            note_refusal(self._fleet_audit, context, error)
        return fail_call(context, error, response)
