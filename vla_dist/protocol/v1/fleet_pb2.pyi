from vla_dist.protocol.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
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
    __slots__ = ("segment",)
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    segment: _types_pb2.Segment
    def __init__(self, segment: _Optional[_Union[_types_pb2.Segment, _Mapping]] = ...) -> None: ...

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

class HeartbeatRequest(_message.Message):
    __slots__ = ("robot_id", "counters")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ROBOT_ID_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    robot_id: str
    counters: _containers.ScalarMap[str, float]
    def __init__(self, robot_id: _Optional[str] = ..., counters: _Optional[_Mapping[str, float]] = ...) -> None: ...

class HeartbeatResponse(_message.Message):
    __slots__ = ("command",)
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    command: FleetCommand
    def __init__(self, command: _Optional[_Union[FleetCommand, str]] = ...) -> None: ...
