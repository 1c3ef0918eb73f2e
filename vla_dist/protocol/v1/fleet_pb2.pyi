from vla_dist.protocol.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AckStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ACK_STATUS_UNSPECIFIED: _ClassVar[AckStatus]
    ACK_STATUS_STORED: _ClassVar[AckStatus]
    ACK_STATUS_DUPLICATE: _ClassVar[AckStatus]
    ACK_STATUS_QUARANTINED: _ClassVar[AckStatus]
    ACK_STATUS_RETRY: _ClassVar[AckStatus]

class FleetCommand(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FLEET_COMMAND_UNSPECIFIED: _ClassVar[FleetCommand]
    FLEET_COMMAND_CONTINUE: _ClassVar[FleetCommand]
    FLEET_COMMAND_DRAIN: _ClassVar[FleetCommand]
    FLEET_COMMAND_STOP: _ClassVar[FleetCommand]
ACK_STATUS_UNSPECIFIED: AckStatus
ACK_STATUS_STORED: AckStatus
ACK_STATUS_DUPLICATE: AckStatus
ACK_STATUS_QUARANTINED: AckStatus
ACK_STATUS_RETRY: AckStatus
FLEET_COMMAND_UNSPECIFIED: FleetCommand
FLEET_COMMAND_CONTINUE: FleetCommand
FLEET_COMMAND_DRAIN: FleetCommand
FLEET_COMMAND_STOP: FleetCommand

class UploadRequest(_message.Message):
    __slots__ = ("segment", "packed_images", "episode", "claim")
    class PackedImagesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: PackedFrames
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[PackedFrames, _Mapping]] = ...) -> None: ...
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    PACKED_IMAGES_FIELD_NUMBER: _ClassVar[int]
    EPISODE_FIELD_NUMBER: _ClassVar[int]
    CLAIM_FIELD_NUMBER: _ClassVar[int]
    segment: _types_pb2.Segment
    packed_images: _containers.MessageMap[str, PackedFrames]
    episode: EpisodeRecord
    claim: RobotClaim
    def __init__(self, segment: _Optional[_Union[_types_pb2.Segment, _Mapping]] = ..., packed_images: _Optional[_Mapping[str, PackedFrames]] = ..., episode: _Optional[_Union[EpisodeRecord, _Mapping]] = ..., claim: _Optional[_Union[RobotClaim, _Mapping]] = ...) -> None: ...

class PackedFrames(_message.Message):
    __slots__ = ("encoding", "frames")
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    encoding: str
    frames: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, encoding: _Optional[str] = ..., frames: _Optional[_Iterable[bytes]] = ...) -> None: ...

class RobotClaim(_message.Message):
    __slots__ = ("robot_id", "spool_id", "host")
    ROBOT_ID_FIELD_NUMBER: _ClassVar[int]
    SPOOL_ID_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    robot_id: str
    spool_id: str
    host: str
    def __init__(self, robot_id: _Optional[str] = ..., spool_id: _Optional[str] = ..., host: _Optional[str] = ...) -> None: ...

class Intervention(_message.Message):
    __slots__ = ("operator", "first_step", "end_step")
    OPERATOR_FIELD_NUMBER: _ClassVar[int]
    FIRST_STEP_FIELD_NUMBER: _ClassVar[int]
    END_STEP_FIELD_NUMBER: _ClassVar[int]
    operator: str
    first_step: int
    end_step: int
    def __init__(self, operator: _Optional[str] = ..., first_step: _Optional[int] = ..., end_step: _Optional[int] = ...) -> None: ...

class EpisodeRecord(_message.Message):
    __slots__ = ("episode_id", "robot_id", "task", "source", "num_steps", "num_segments", "success", "labelled_by", "partial", "interventions", "notes", "lease_id", "started_unix_s", "duration_s", "problems", "content_sha256", "frames_sha256")
    EPISODE_ID_FIELD_NUMBER: _ClassVar[int]
    ROBOT_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    SUCCESS_FIELD_NUMBER: _ClassVar[int]
    LABELLED_BY_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_FIELD_NUMBER: _ClassVar[int]
    INTERVENTIONS_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    STARTED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    CONTENT_SHA256_FIELD_NUMBER: _ClassVar[int]
    FRAMES_SHA256_FIELD_NUMBER: _ClassVar[int]
    episode_id: str
    robot_id: str
    task: str
    source: _types_pb2.Source
    num_steps: int
    num_segments: int
    success: bool
    labelled_by: str
    partial: str
    interventions: _containers.RepeatedCompositeFieldContainer[Intervention]
    notes: _containers.RepeatedScalarFieldContainer[str]
    lease_id: str
    started_unix_s: float
    duration_s: float
    problems: _containers.RepeatedScalarFieldContainer[str]
    content_sha256: str
    frames_sha256: str
    def __init__(self, episode_id: _Optional[str] = ..., robot_id: _Optional[str] = ..., task: _Optional[str] = ..., source: _Optional[_Union[_types_pb2.Source, str]] = ..., num_steps: _Optional[int] = ..., num_segments: _Optional[int] = ..., success: _Optional[bool] = ..., labelled_by: _Optional[str] = ..., partial: _Optional[str] = ..., interventions: _Optional[_Iterable[_Union[Intervention, _Mapping]]] = ..., notes: _Optional[_Iterable[str]] = ..., lease_id: _Optional[str] = ..., started_unix_s: _Optional[float] = ..., duration_s: _Optional[float] = ..., problems: _Optional[_Iterable[str]] = ..., content_sha256: _Optional[str] = ..., frames_sha256: _Optional[str] = ...) -> None: ...

class UploadResponse(_message.Message):
    __slots__ = ("episode_id", "segment_index", "status", "reason")
    EPISODE_ID_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_INDEX_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    episode_id: str
    segment_index: int
    status: AckStatus
    reason: str
    def __init__(self, episode_id: _Optional[str] = ..., segment_index: _Optional[int] = ..., status: _Optional[_Union[AckStatus, str]] = ..., reason: _Optional[str] = ...) -> None: ...

class NextTaskRequest(_message.Message):
    __slots__ = ("claim", "tasks", "sources")
    CLAIM_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    claim: RobotClaim
    tasks: _containers.RepeatedScalarFieldContainer[str]
    sources: _containers.RepeatedScalarFieldContainer[_types_pb2.Source]
    def __init__(self, claim: _Optional[_Union[RobotClaim, _Mapping]] = ..., tasks: _Optional[_Iterable[str]] = ..., sources: _Optional[_Iterable[_Union[_types_pb2.Source, str]]] = ...) -> None: ...

class Assignment(_message.Message):
    __slots__ = ("lease_id", "task", "instruction", "source", "policy", "seed", "lease_s")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    INSTRUCTION_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    task: str
    instruction: str
    source: _types_pb2.Source
    policy: str
    seed: int
    lease_s: float
    def __init__(self, lease_id: _Optional[str] = ..., task: _Optional[str] = ..., instruction: _Optional[str] = ..., source: _Optional[_Union[_types_pb2.Source, str]] = ..., policy: _Optional[str] = ..., seed: _Optional[int] = ..., lease_s: _Optional[float] = ...) -> None: ...

class NextTaskResponse(_message.Message):
    __slots__ = ("command", "assignment", "wait_s", "reason")
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    command: FleetCommand
    assignment: Assignment
    wait_s: float
    reason: str
    def __init__(self, command: _Optional[_Union[FleetCommand, str]] = ..., assignment: _Optional[_Union[Assignment, _Mapping]] = ..., wait_s: _Optional[float] = ..., reason: _Optional[str] = ...) -> None: ...

class FindMissingRequest(_message.Message):
    __slots__ = ("episode_ids",)
    EPISODE_IDS_FIELD_NUMBER: _ClassVar[int]
    episode_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, episode_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class FindMissingResponse(_message.Message):
    __slots__ = ("episode_ids",)
    EPISODE_IDS_FIELD_NUMBER: _ClassVar[int]
    episode_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, episode_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("robot_id", "counters", "claim", "lease_id", "returned_lease_id")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ROBOT_ID_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    CLAIM_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    RETURNED_LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    robot_id: str
    counters: _containers.ScalarMap[str, float]
    claim: RobotClaim
    lease_id: str
    returned_lease_id: str
    def __init__(self, robot_id: _Optional[str] = ..., counters: _Optional[_Mapping[str, float]] = ..., claim: _Optional[_Union[RobotClaim, _Mapping]] = ..., lease_id: _Optional[str] = ..., returned_lease_id: _Optional[str] = ...) -> None: ...

class HeartbeatResponse(_message.Message):
    __slots__ = ("command",)
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    command: FleetCommand
    def __init__(self, command: _Optional[_Union[FleetCommand, str]] = ...) -> None: ...
