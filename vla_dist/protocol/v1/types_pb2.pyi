from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DataType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DATA_TYPE_UNSPECIFIED: _ClassVar[DataType]
    DATA_TYPE_FLOAT32: _ClassVar[DataType]
    DATA_TYPE_UINT8: _ClassVar[DataType]
    DATA_TYPE_BOOL: _ClassVar[DataType]

class ActionKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ACTION_KIND_UNSPECIFIED: _ClassVar[ActionKind]
    ACTION_KIND_CONTINUOUS: _ClassVar[ActionKind]
    ACTION_KIND_DISCRETE: _ClassVar[ActionKind]

class Fallback(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FALLBACK_UNSPECIFIED: _ClassVar[Fallback]
    FALLBACK_HOLD: _ClassVar[Fallback]
    FALLBACK_DECELERATE: _ClassVar[Fallback]
    FALLBACK_ZERO: _ClassVar[Fallback]
    FALLBACK_LOCAL_POLICY: _ClassVar[Fallback]

class Source(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SOURCE_UNSPECIFIED: _ClassVar[Source]
    SOURCE_EXPERT: _ClassVar[Source]
    SOURCE_POLICY: _ClassVar[Source]
    SOURCE_HUMAN: _ClassVar[Source]
DATA_TYPE_UNSPECIFIED: DataType
DATA_TYPE_FLOAT32: DataType
DATA_TYPE_UINT8: DataType
DATA_TYPE_BOOL: DataType
ACTION_KIND_UNSPECIFIED: ActionKind
ACTION_KIND_CONTINUOUS: ActionKind
ACTION_KIND_DISCRETE: ActionKind
FALLBACK_UNSPECIFIED: Fallback
FALLBACK_HOLD: Fallback
FALLBACK_DECELERATE: Fallback
FALLBACK_ZERO: Fallback
FALLBACK_LOCAL_POLICY: Fallback
SOURCE_UNSPECIFIED: Source
SOURCE_EXPERT: Source
SOURCE_POLICY: Source
SOURCE_HUMAN: Source

class Array(_message.Message):
    __slots__ = ("data_type", "shape", "data")
    DATA_TYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    data_type: DataType
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, data_type: _Optional[_Union[DataType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class Dimension(_message.Message):
    __slots__ = ("name", "unit", "low", "high")
    NAME_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    LOW_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    name: str
    unit: str
    low: float
    high: float
    def __init__(self, name: _Optional[str] = ..., unit: _Optional[str] = ..., low: _Optional[float] = ..., high: _Optional[float] = ...) -> None: ...

class CameraSpec(_message.Message):
    __slots__ = ("name", "height", "width")
    NAME_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    name: str
    height: int
    width: int
    def __init__(self, name: _Optional[str] = ..., height: _Optional[int] = ..., width: _Optional[int] = ...) -> None: ...

class EnvSpec(_message.Message):
    __slots__ = ("name", "proprio", "action", "control_hz", "max_episode_steps", "cameras", "action_kind", "normalisation_hash")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PROPRIO_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    CONTROL_HZ_FIELD_NUMBER: _ClassVar[int]
    MAX_EPISODE_STEPS_FIELD_NUMBER: _ClassVar[int]
    CAMERAS_FIELD_NUMBER: _ClassVar[int]
    ACTION_KIND_FIELD_NUMBER: _ClassVar[int]
    NORMALISATION_HASH_FIELD_NUMBER: _ClassVar[int]
    name: str
    proprio: _containers.RepeatedCompositeFieldContainer[Dimension]
    action: _containers.RepeatedCompositeFieldContainer[Dimension]
    control_hz: float
    max_episode_steps: int
    cameras: _containers.RepeatedCompositeFieldContainer[CameraSpec]
    action_kind: ActionKind
    normalisation_hash: str
    def __init__(self, name: _Optional[str] = ..., proprio: _Optional[_Iterable[_Union[Dimension, _Mapping]]] = ..., action: _Optional[_Iterable[_Union[Dimension, _Mapping]]] = ..., control_hz: _Optional[float] = ..., max_episode_steps: _Optional[int] = ..., cameras: _Optional[_Iterable[_Union[CameraSpec, _Mapping]]] = ..., action_kind: _Optional[_Union[ActionKind, str]] = ..., normalisation_hash: _Optional[str] = ...) -> None: ...

class Observation(_message.Message):
    __slots__ = ("proprio", "instruction", "images", "previous_action", "previous_reward")
    class ImagesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Array
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Array, _Mapping]] = ...) -> None: ...
    PROPRIO_FIELD_NUMBER: _ClassVar[int]
    INSTRUCTION_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_ACTION_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_REWARD_FIELD_NUMBER: _ClassVar[int]
    proprio: Array
    instruction: str
    images: _containers.MessageMap[str, Array]
    previous_action: Array
    previous_reward: float
    def __init__(self, proprio: _Optional[_Union[Array, _Mapping]] = ..., instruction: _Optional[str] = ..., images: _Optional[_Mapping[str, Array]] = ..., previous_action: _Optional[_Union[Array, _Mapping]] = ..., previous_reward: _Optional[float] = ...) -> None: ...

class ActionChunk(_message.Message):
    __slots__ = ("actions", "policy_version", "observation_id", "valid_for_ms", "fallback")
    ACTIONS_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    OBSERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    VALID_FOR_MS_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_FIELD_NUMBER: _ClassVar[int]
    actions: Array
    policy_version: int
    observation_id: int
    valid_for_ms: float
    fallback: Fallback
    def __init__(self, actions: _Optional[_Union[Array, _Mapping]] = ..., policy_version: _Optional[int] = ..., observation_id: _Optional[int] = ..., valid_for_ms: _Optional[float] = ..., fallback: _Optional[_Union[Fallback, str]] = ...) -> None: ...

class Segment(_message.Message):
    __slots__ = ("episode_id", "segment_index", "robot_id", "task", "instruction", "policy_version", "source", "is_last", "success", "length", "proprio", "actions", "target_actions", "rewards", "interventions", "images")
    class ImagesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Array
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Array, _Mapping]] = ...) -> None: ...
    EPISODE_ID_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_INDEX_FIELD_NUMBER: _ClassVar[int]
    ROBOT_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    INSTRUCTION_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    IS_LAST_FIELD_NUMBER: _ClassVar[int]
    SUCCESS_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    PROPRIO_FIELD_NUMBER: _ClassVar[int]
    ACTIONS_FIELD_NUMBER: _ClassVar[int]
    TARGET_ACTIONS_FIELD_NUMBER: _ClassVar[int]
    REWARDS_FIELD_NUMBER: _ClassVar[int]
    INTERVENTIONS_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    episode_id: str
    segment_index: int
    robot_id: str
    task: str
    instruction: str
    policy_version: int
    source: Source
    is_last: bool
    success: bool
    length: int
    proprio: Array
    actions: Array
    target_actions: Array
    rewards: Array
    interventions: Array
    images: _containers.MessageMap[str, Array]
    def __init__(self, episode_id: _Optional[str] = ..., segment_index: _Optional[int] = ..., robot_id: _Optional[str] = ..., task: _Optional[str] = ..., instruction: _Optional[str] = ..., policy_version: _Optional[int] = ..., source: _Optional[_Union[Source, str]] = ..., is_last: _Optional[bool] = ..., success: _Optional[bool] = ..., length: _Optional[int] = ..., proprio: _Optional[_Union[Array, _Mapping]] = ..., actions: _Optional[_Union[Array, _Mapping]] = ..., target_actions: _Optional[_Union[Array, _Mapping]] = ..., rewards: _Optional[_Union[Array, _Mapping]] = ..., interventions: _Optional[_Union[Array, _Mapping]] = ..., images: _Optional[_Mapping[str, Array]] = ...) -> None: ...
