"""Records of the fleet's service to protobuf messages and back; every ``decode_*`` raises DataError."""

import math
from collections.abc import Mapping, Sequence

from vla_dist.core.errors import DataError
from vla_dist.core.types import Source
from vla_dist.protocol.fleet_records import Assignment, EpisodeRecord, Intervention, NextTask, RobotClaim
from vla_dist.protocol.records import AckStatus, FleetCommand
from vla_dist.protocol.v1 import fleet_pb2, types_pb2

MAX_NOTES = 64
"""Most notes, interventions and problems of an episode."""
MAX_TEXT_BYTES = 4096

ACKS: Mapping[AckStatus, fleet_pb2.AckStatus] = {
    "stored": fleet_pb2.ACK_STATUS_STORED,
    "duplicate": fleet_pb2.ACK_STATUS_DUPLICATE,
    "quarantined": fleet_pb2.ACK_STATUS_QUARANTINED,
    "retry": fleet_pb2.ACK_STATUS_RETRY,
}
COMMANDS: Mapping[FleetCommand, fleet_pb2.FleetCommand] = {
    "continue": fleet_pb2.FLEET_COMMAND_CONTINUE,
    "drain": fleet_pb2.FLEET_COMMAND_DRAIN,
    "stop": fleet_pb2.FLEET_COMMAND_STOP,
}
_SOURCES: Mapping[Source, types_pb2.Source] = {
    "expert": types_pb2.SOURCE_EXPERT,
    "policy": types_pb2.SOURCE_POLICY,
    "human": types_pb2.SOURCE_HUMAN,
}
_ACKS_BACK: dict[int, AckStatus] = {number: name for name, number in ACKS.items()}
_COMMANDS_BACK: dict[int, FleetCommand] = {number: name for name, number in COMMANDS.items()}
_SOURCES_BACK: dict[int, Source] = {number: name for name, number in _SOURCES.items()}


def decode_ack_status(value: int) -> AckStatus:
    """A status that this version does not know is taken for ``retry``: nothing is given up."""
    return _ACKS_BACK.get(value, "retry")


def decode_command(value: int) -> FleetCommand:
    """A command that this version does not know is taken for ``stop``."""
    return _COMMANDS_BACK.get(value, "stop")


def encode_claim(claim: RobotClaim) -> fleet_pb2.RobotClaim:
    return fleet_pb2.RobotClaim(robot_id=claim.robot_id, spool_id=claim.spool_id, host=claim.host)


def decode_claim(message: fleet_pb2.RobotClaim) -> RobotClaim:
    for label in ("robot_id", "spool_id", "host"):
        _require_text(f"claim.{label}", getattr(message, label), 256)
    if not message.robot_id or not message.spool_id:
        raise DataError(f"the claim names robot {message.robot_id!r}, spool {message.spool_id!r}; both are needed")
    return RobotClaim(robot_id=message.robot_id, spool_id=message.spool_id, host=message.host)


def encode_episode(record: EpisodeRecord) -> fleet_pb2.EpisodeRecord:
    return fleet_pb2.EpisodeRecord(
        episode_id=record.episode_id,
        robot_id=record.robot_id,
        task=record.task,
        source=_SOURCES[record.source],
        num_steps=record.num_steps,
        num_segments=record.num_segments,
        success=record.success,
        labelled_by=record.labelled_by,
        partial=record.partial,
        interventions=[
            fleet_pb2.Intervention(operator=one.operator, first_step=one.first_step, end_step=one.end_step)
            for one in record.interventions
        ],
        notes=record.notes,
        lease_id=record.lease_id,
        started_unix_s=record.started_unix_s,
        duration_s=record.duration_s,
        problems=record.problems,
        content_sha256=record.content_sha256,
        frames_sha256=record.frames_sha256,
    )


def decode_episode(message: fleet_pb2.EpisodeRecord) -> EpisodeRecord:
    for label in ("robot_id", "task", "labelled_by", "partial", "lease_id", "content_sha256", "frames_sha256"):
        _require_text(f"episode.{label}", getattr(message, label), MAX_TEXT_BYTES)
    for label in ("notes", "problems"):
        _require_few(f"episode.{label}", getattr(message, label))
        for text in getattr(message, label):
            _require_text(f"episode.{label}", text, MAX_TEXT_BYTES)
    _require_few("episode.interventions", message.interventions)
    if not message.episode_id.isascii() or not 1 <= len(message.episode_id) <= 64:
        raise DataError(f"episode_id {message.episode_id[:80]!r} must be 1 to 64 ASCII characters")
    if message.source not in _SOURCES_BACK:
        raise DataError(f"episode.source is {message.source}, expected one of {', '.join(_SOURCES)}")
    if not (math.isfinite(message.started_unix_s) and math.isfinite(message.duration_s)):
        raise DataError(
            f"episode times {message.started_unix_s} and {message.duration_s} must be finite; check the robot's clock"
        )
    interventions = tuple(
        Intervention(operator=one.operator[:256], first_step=one.first_step, end_step=one.end_step)
        for one in message.interventions
    )
    for one in interventions:
        if one.end_step > message.num_steps:
            raise DataError(
                f"intervention by {one.operator!r} ends at step {one.end_step}, the episode has {message.num_steps}"
            )
    return EpisodeRecord(
        episode_id=message.episode_id,
        robot_id=message.robot_id,
        task=message.task,
        source=_SOURCES_BACK[message.source],
        num_steps=message.num_steps,
        num_segments=message.num_segments,
        success=message.success,
        labelled_by=message.labelled_by,
        partial=message.partial,
        interventions=interventions,
        notes=tuple(message.notes),
        lease_id=message.lease_id,
        started_unix_s=message.started_unix_s,
        duration_s=message.duration_s,
        problems=tuple(message.problems),
        content_sha256=message.content_sha256,
        frames_sha256=message.frames_sha256,
    )


def encode_next_task(answer: NextTask) -> fleet_pb2.NextTaskResponse:
    response = fleet_pb2.NextTaskResponse(command=COMMANDS[answer.command], wait_s=answer.wait_s, reason=answer.reason)
    given = answer.assignment
    if given is not None:
        response.assignment.CopyFrom(
            fleet_pb2.Assignment(
                lease_id=given.lease_id,
                task=given.task,
                instruction=given.instruction,
                source=_SOURCES[given.source],
                policy=given.policy,
                seed=given.seed,
                lease_s=given.lease_s,
            )
        )
    return response


def decode_next_task(message: fleet_pb2.NextTaskResponse) -> NextTask:
    assignment = None
    if message.HasField("assignment"):
        given = message.assignment
        if given.source not in _SOURCES_BACK:
            raise DataError(f"the assignment's source is {given.source}; update this robot's vla-dist")
        assignment = Assignment(
            lease_id=given.lease_id,
            task=given.task,
            instruction=given.instruction,
            source=_SOURCES_BACK[given.source],
            policy=given.policy,
            seed=given.seed,
            lease_s=given.lease_s,
        )
    return NextTask(
        command=decode_command(message.command), assignment=assignment, wait_s=message.wait_s, reason=message.reason
    )


def encode_sources(sources: Sequence[Source]) -> list[types_pb2.Source]:
    return [_SOURCES[source] for source in sources]


def decode_sources(values: Sequence[int]) -> tuple[Source, ...]:
    """Those that this version knows."""
    return tuple(_SOURCES_BACK[value] for value in values if value in _SOURCES_BACK)


def _require_text(label: str, text: str, max_bytes: int) -> None:
    if len(text.encode()) > max_bytes:
        raise DataError(f"{label} has {len(text.encode())} bytes, expected at most {max_bytes}; shorten it")


def _require_few(label: str, items: Sequence[object]) -> None:
    if len(items) > MAX_NOTES:
        raise DataError(f"{label} has {len(items)} entries, expected at most {MAX_NOTES}")
