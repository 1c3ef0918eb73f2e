from vla_dist.protocol.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EpisodeOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EPISODE_OUTCOME_UNSPECIFIED: _ClassVar[EpisodeOutcome]
    EPISODE_OUTCOME_SUCCESS: _ClassVar[EpisodeOutcome]
    EPISODE_OUTCOME_FAILURE: _ClassVar[EpisodeOutcome]

class RefusalReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REFUSAL_REASON_UNSPECIFIED: _ClassVar[RefusalReason]
    REFUSAL_REASON_LATE: _ClassVar[RefusalReason]
    REFUSAL_REASON_INVALID: _ClassVar[RefusalReason]
    REFUSAL_REASON_OVERLOADED: _ClassVar[RefusalReason]
EPISODE_OUTCOME_UNSPECIFIED: EpisodeOutcome
EPISODE_OUTCOME_SUCCESS: EpisodeOutcome
EPISODE_OUTCOME_FAILURE: EpisodeOutcome
REFUSAL_REASON_UNSPECIFIED: RefusalReason
REFUSAL_REASON_LATE: RefusalReason
REFUSAL_REASON_INVALID: RefusalReason
REFUSAL_REASON_OVERLOADED: RefusalReason

class OpenSessionRequest(_message.Message):
    __slots__ = ("spec", "policy", "policy_version", "robot_id", "task", "service_id")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    ROBOT_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    SERVICE_ID_FIELD_NUMBER: _ClassVar[int]
    spec: _types_pb2.EnvSpec
    policy: str
    policy_version: int
    robot_id: str
    task: str
    service_id: str
    def __init__(self, spec: _Optional[_Union[_types_pb2.EnvSpec, _Mapping]] = ..., policy: _Optional[str] = ..., policy_version: _Optional[int] = ..., robot_id: _Optional[str] = ..., task: _Optional[str] = ..., service_id: _Optional[str] = ...) -> None: ...

class OpenSessionResponse(_message.Message):
    __slots__ = ("policy_version", "horizon", "context_steps", "limits", "spec_digest", "service_id", "channel")
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    HORIZON_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_STEPS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    SPEC_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SERVICE_ID_FIELD_NUMBER: _ClassVar[int]
    CHANNEL_FIELD_NUMBER: _ClassVar[int]
    policy_version: int
    horizon: int
    context_steps: int
    limits: SessionLimits
    spec_digest: str
    service_id: str
    channel: str
    def __init__(self, policy_version: _Optional[int] = ..., horizon: _Optional[int] = ..., context_steps: _Optional[int] = ..., limits: _Optional[_Union[SessionLimits, _Mapping]] = ..., spec_digest: _Optional[str] = ..., service_id: _Optional[str] = ..., channel: _Optional[str] = ...) -> None: ...

class SessionLimits(_message.Message):
    __slots__ = ("idle_timeout_s", "max_instruction_bytes", "max_deadline_s")
    IDLE_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    MAX_INSTRUCTION_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    idle_timeout_s: float
    max_instruction_bytes: int
    max_deadline_s: float
    def __init__(self, idle_timeout_s: _Optional[float] = ..., max_instruction_bytes: _Optional[int] = ..., max_deadline_s: _Optional[float] = ...) -> None: ...

class ActRequest(_message.Message):
    __slots__ = ("policy", "policy_version", "spec_digest", "history", "observation", "observation_id", "deadline_ms", "history_start", "plan")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    SPEC_DIGEST_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    OBSERVATION_FIELD_NUMBER: _ClassVar[int]
    OBSERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    HISTORY_START_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    policy: str
    policy_version: int
    spec_digest: str
    history: _containers.RepeatedCompositeFieldContainer[_types_pb2.Observation]
    observation: _types_pb2.Observation
    observation_id: int
    deadline_ms: float
    history_start: int
    plan: PlanInProgress
    def __init__(self, policy: _Optional[str] = ..., policy_version: _Optional[int] = ..., spec_digest: _Optional[str] = ..., history: _Optional[_Iterable[_Union[_types_pb2.Observation, _Mapping]]] = ..., observation: _Optional[_Union[_types_pb2.Observation, _Mapping]] = ..., observation_id: _Optional[int] = ..., deadline_ms: _Optional[float] = ..., history_start: _Optional[int] = ..., plan: _Optional[_Union[PlanInProgress, _Mapping]] = ...) -> None: ...

class ActResponse(_message.Message):
    __slots__ = ("chunk",)
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    chunk: _types_pb2.ActionChunk
    def __init__(self, chunk: _Optional[_Union[_types_pb2.ActionChunk, _Mapping]] = ...) -> None: ...

class ControlRequest(_message.Message):
    __slots__ = ("open", "observation", "goodbye")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    OBSERVATION_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    open: ControlOpen
    observation: ControlObservation
    goodbye: ControlGoodbye
    def __init__(self, open: _Optional[_Union[ControlOpen, _Mapping]] = ..., observation: _Optional[_Union[ControlObservation, _Mapping]] = ..., goodbye: _Optional[_Union[ControlGoodbye, _Mapping]] = ...) -> None: ...

class ControlOpen(_message.Message):
    __slots__ = ("session", "history", "history_start", "state")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    HISTORY_START_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    session: OpenSessionRequest
    history: _containers.RepeatedCompositeFieldContainer[_types_pb2.Observation]
    history_start: int
    state: PolicyState
    def __init__(self, session: _Optional[_Union[OpenSessionRequest, _Mapping]] = ..., history: _Optional[_Iterable[_Union[_types_pb2.Observation, _Mapping]]] = ..., history_start: _Optional[int] = ..., state: _Optional[_Union[PolicyState, _Mapping]] = ...) -> None: ...

class PolicyState(_message.Message):
    __slots__ = ("num_steps", "sealed")
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    num_steps: int
    sealed: bytes
    def __init__(self, num_steps: _Optional[int] = ..., sealed: _Optional[bytes] = ...) -> None: ...

class PlanInProgress(_message.Message):
    __slots__ = ("observation_id", "consumed_steps", "remaining", "committed_steps")
    OBSERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    CONSUMED_STEPS_FIELD_NUMBER: _ClassVar[int]
    REMAINING_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_STEPS_FIELD_NUMBER: _ClassVar[int]
    observation_id: int
    consumed_steps: int
    remaining: _types_pb2.Array
    committed_steps: int
    def __init__(self, observation_id: _Optional[int] = ..., consumed_steps: _Optional[int] = ..., remaining: _Optional[_Union[_types_pb2.Array, _Mapping]] = ..., committed_steps: _Optional[int] = ...) -> None: ...

class ControlObservation(_message.Message):
    __slots__ = ("observation", "observation_id", "deadline_ms", "plan")
    OBSERVATION_FIELD_NUMBER: _ClassVar[int]
    OBSERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    observation: _types_pb2.Observation
    observation_id: int
    deadline_ms: float
    plan: PlanInProgress
    def __init__(self, observation: _Optional[_Union[_types_pb2.Observation, _Mapping]] = ..., observation_id: _Optional[int] = ..., deadline_ms: _Optional[float] = ..., plan: _Optional[_Union[PlanInProgress, _Mapping]] = ...) -> None: ...

class ControlGoodbye(_message.Message):
    __slots__ = ("outcome", "episode_id")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    EPISODE_ID_FIELD_NUMBER: _ClassVar[int]
    outcome: EpisodeOutcome
    episode_id: str
    def __init__(self, outcome: _Optional[_Union[EpisodeOutcome, str]] = ..., episode_id: _Optional[str] = ...) -> None: ...

class ControlResponse(_message.Message):
    __slots__ = ("opened", "chunk", "refusal", "state", "renew_within_s")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    RENEW_WITHIN_S_FIELD_NUMBER: _ClassVar[int]
    opened: OpenSessionResponse
    chunk: _types_pb2.ActionChunk
    refusal: ControlRefusal
    state: PolicyState
    renew_within_s: float
    def __init__(self, opened: _Optional[_Union[OpenSessionResponse, _Mapping]] = ..., chunk: _Optional[_Union[_types_pb2.ActionChunk, _Mapping]] = ..., refusal: _Optional[_Union[ControlRefusal, _Mapping]] = ..., state: _Optional[_Union[PolicyState, _Mapping]] = ..., renew_within_s: _Optional[float] = ...) -> None: ...

class ControlRefusal(_message.Message):
    __slots__ = ("observation_id", "reason", "detail")
    OBSERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    observation_id: int
    reason: RefusalReason
    detail: str
    def __init__(self, observation_id: _Optional[int] = ..., reason: _Optional[_Union[RefusalReason, str]] = ..., detail: _Optional[str] = ...) -> None: ...

class ListPoliciesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListPoliciesResponse(_message.Message):
    __slots__ = ("policies",)
    POLICIES_FIELD_NUMBER: _ClassVar[int]
    policies: _containers.RepeatedCompositeFieldContainer[PolicyInfo]
    def __init__(self, policies: _Optional[_Iterable[_Union[PolicyInfo, _Mapping]]] = ...) -> None: ...

class PolicyInfo(_message.Message):
    __slots__ = ("policy", "current_version", "versions")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    CURRENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    policy: str
    current_version: int
    versions: _containers.RepeatedCompositeFieldContainer[VersionInfo]
    def __init__(self, policy: _Optional[str] = ..., current_version: _Optional[int] = ..., versions: _Optional[_Iterable[_Union[VersionInfo, _Mapping]]] = ...) -> None: ...

class VersionInfo(_message.Message):
    __slots__ = ("version", "parent", "spec", "horizon", "loaded")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    HORIZON_FIELD_NUMBER: _ClassVar[int]
    LOADED_FIELD_NUMBER: _ClassVar[int]
    version: int
    parent: int
    spec: _types_pb2.EnvSpec
    horizon: int
    loaded: bool
    def __init__(self, version: _Optional[int] = ..., parent: _Optional[int] = ..., spec: _Optional[_Union[_types_pb2.EnvSpec, _Mapping]] = ..., horizon: _Optional[int] = ..., loaded: _Optional[bool] = ...) -> None: ...

class CheckHealthRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CheckHealthResponse(_message.Message):
    __slots__ = ("loaded", "num_sessions", "problems", "replica_id")
    LOADED_FIELD_NUMBER: _ClassVar[int]
    NUM_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    loaded: _containers.RepeatedCompositeFieldContainer[LoadedVersion]
    num_sessions: int
    problems: _containers.RepeatedScalarFieldContainer[str]
    replica_id: str
    def __init__(self, loaded: _Optional[_Iterable[_Union[LoadedVersion, _Mapping]]] = ..., num_sessions: _Optional[int] = ..., problems: _Optional[_Iterable[str]] = ..., replica_id: _Optional[str] = ...) -> None: ...

class LoadedVersion(_message.Message):
    __slots__ = ("name", "version", "num_sessions")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NUM_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    num_sessions: int
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., num_sessions: _Optional[int] = ...) -> None: ...
