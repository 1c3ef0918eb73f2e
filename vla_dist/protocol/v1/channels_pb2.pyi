from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CanaryState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CANARY_STATE_UNSPECIFIED: _ClassVar[CanaryState]
    CANARY_STATE_RUNNING: _ClassVar[CanaryState]
    CANARY_STATE_PROMOTED: _ClassVar[CanaryState]
    CANARY_STATE_ROLLED_BACK: _ClassVar[CanaryState]

class CanaryDecision(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CANARY_DECISION_UNSPECIFIED: _ClassVar[CanaryDecision]
    CANARY_DECISION_CONTINUE: _ClassVar[CanaryDecision]
    CANARY_DECISION_PROMOTE: _ClassVar[CanaryDecision]
    CANARY_DECISION_ROLLBACK: _ClassVar[CanaryDecision]
CANARY_STATE_UNSPECIFIED: CanaryState
CANARY_STATE_RUNNING: CanaryState
CANARY_STATE_PROMOTED: CanaryState
CANARY_STATE_ROLLED_BACK: CanaryState
CANARY_DECISION_UNSPECIFIED: CanaryDecision
CANARY_DECISION_CONTINUE: CanaryDecision
CANARY_DECISION_PROMOTE: CanaryDecision
CANARY_DECISION_ROLLBACK: CanaryDecision

class DescribeChannelsRequest(_message.Message):
    __slots__ = ("name", "max_audit_entries")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MAX_AUDIT_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    name: str
    max_audit_entries: int
    def __init__(self, name: _Optional[str] = ..., max_audit_entries: _Optional[int] = ...) -> None: ...

class DescribeChannelsResponse(_message.Message):
    __slots__ = ("reports", "audit")
    REPORTS_FIELD_NUMBER: _ClassVar[int]
    AUDIT_FIELD_NUMBER: _ClassVar[int]
    reports: _containers.RepeatedCompositeFieldContainer[ChannelReport]
    audit: _containers.RepeatedCompositeFieldContainer[AuditEntry]
    def __init__(self, reports: _Optional[_Iterable[_Union[ChannelReport, _Mapping]]] = ..., audit: _Optional[_Iterable[_Union[AuditEntry, _Mapping]]] = ...) -> None: ...

class ChannelReport(_message.Message):
    __slots__ = ("name", "channels", "plan", "canary", "incumbent", "verdict")
    class ChannelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    CANARY_FIELD_NUMBER: _ClassVar[int]
    INCUMBENT_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    name: str
    channels: _containers.ScalarMap[str, int]
    plan: CanaryPlan
    canary: EpisodeTally
    incumbent: EpisodeTally
    verdict: CanaryVerdict
    def __init__(self, name: _Optional[str] = ..., channels: _Optional[_Mapping[str, int]] = ..., plan: _Optional[_Union[CanaryPlan, _Mapping]] = ..., canary: _Optional[_Union[EpisodeTally, _Mapping]] = ..., incumbent: _Optional[_Union[EpisodeTally, _Mapping]] = ..., verdict: _Optional[_Union[CanaryVerdict, _Mapping]] = ...) -> None: ...

class EpisodeTally(_message.Message):
    __slots__ = ("successes", "trials")
    SUCCESSES_FIELD_NUMBER: _ClassVar[int]
    TRIALS_FIELD_NUMBER: _ClassVar[int]
    successes: int
    trials: int
    def __init__(self, successes: _Optional[int] = ..., trials: _Optional[int] = ...) -> None: ...

class CanaryRule(_message.Message):
    __slots__ = ("margin", "confidence", "min_episodes")
    MARGIN_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    MIN_EPISODES_FIELD_NUMBER: _ClassVar[int]
    margin: float
    confidence: float
    min_episodes: int
    def __init__(self, margin: _Optional[float] = ..., confidence: _Optional[float] = ..., min_episodes: _Optional[int] = ...) -> None: ...

class CanaryPlan(_message.Message):
    __slots__ = ("name", "version", "incumbent", "share", "rule", "plan_id", "state", "reason", "started_unix_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    INCUMBENT_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    PLAN_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    STARTED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    incumbent: int
    share: float
    rule: CanaryRule
    plan_id: str
    state: CanaryState
    reason: str
    started_unix_s: float
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., incumbent: _Optional[int] = ..., share: _Optional[float] = ..., rule: _Optional[_Union[CanaryRule, _Mapping]] = ..., plan_id: _Optional[str] = ..., state: _Optional[_Union[CanaryState, str]] = ..., reason: _Optional[str] = ..., started_unix_s: _Optional[float] = ...) -> None: ...

class CanaryVerdict(_message.Message):
    __slots__ = ("decision", "reason")
    DECISION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    decision: CanaryDecision
    reason: str
    def __init__(self, decision: _Optional[_Union[CanaryDecision, str]] = ..., reason: _Optional[str] = ...) -> None: ...

class AuditEntry(_message.Message):
    __slots__ = ("unix_s", "event", "fields")
    class FieldsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    UNIX_S_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    unix_s: float
    event: str
    fields: _containers.ScalarMap[str, str]
    def __init__(self, unix_s: _Optional[float] = ..., event: _Optional[str] = ..., fields: _Optional[_Mapping[str, str]] = ...) -> None: ...

class BeginCanaryRequest(_message.Message):
    __slots__ = ("reference", "share", "rule", "operator")
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    OPERATOR_FIELD_NUMBER: _ClassVar[int]
    reference: str
    share: float
    rule: CanaryRule
    operator: str
    def __init__(self, reference: _Optional[str] = ..., share: _Optional[float] = ..., rule: _Optional[_Union[CanaryRule, _Mapping]] = ..., operator: _Optional[str] = ...) -> None: ...

class BeginCanaryResponse(_message.Message):
    __slots__ = ("plan",)
    PLAN_FIELD_NUMBER: _ClassVar[int]
    plan: CanaryPlan
    def __init__(self, plan: _Optional[_Union[CanaryPlan, _Mapping]] = ...) -> None: ...

class PromoteRequest(_message.Message):
    __slots__ = ("reference", "force", "operator")
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    OPERATOR_FIELD_NUMBER: _ClassVar[int]
    reference: str
    force: str
    operator: str
    def __init__(self, reference: _Optional[str] = ..., force: _Optional[str] = ..., operator: _Optional[str] = ...) -> None: ...

class PromoteResponse(_message.Message):
    __slots__ = ("version", "reason")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    version: int
    reason: str
    def __init__(self, version: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class SetShadowRequest(_message.Message):
    __slots__ = ("reference", "operator")
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    OPERATOR_FIELD_NUMBER: _ClassVar[int]
    reference: str
    operator: str
    def __init__(self, reference: _Optional[str] = ..., operator: _Optional[str] = ...) -> None: ...

class SetShadowResponse(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class RollBackRequest(_message.Message):
    __slots__ = ("name", "reason", "operator")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    OPERATOR_FIELD_NUMBER: _ClassVar[int]
    name: str
    reason: str
    operator: str
    def __init__(self, name: _Optional[str] = ..., reason: _Optional[str] = ..., operator: _Optional[str] = ...) -> None: ...

class RollBackResponse(_message.Message):
    __slots__ = ("done",)
    DONE_FIELD_NUMBER: _ClassVar[int]
    done: str
    def __init__(self, done: _Optional[str] = ...) -> None: ...
