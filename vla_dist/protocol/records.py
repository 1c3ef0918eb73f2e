"""What a session is asked for and granted, as both ends of the wire hold it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vla_dist.core.errors import DataError
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Array, Segment

AckStatus = Literal["stored", "duplicate", "quarantined", "retry"]
FleetCommand = Literal["continue", "drain", "stop"]
Outcome = Literal["success", "failure"]
SegmentKey = tuple[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRequest:
    """Who asks, for which policy, with which body."""

    spec: EnvSpec
    policy: str
    """``name@channel``."""
    robot_id: str = ""
    task: str = ""
    policy_version: int = 0
    """0: what the channel points at. Otherwise exactly this one, as an episode that reconnects asks for."""
    service_id: str = ""
    """The service that granted the episode before; another one refuses."""

    def __post_init__(self) -> None:
        name, at, channel = self.policy.partition("@")
        if not (name and at and channel):
            raise DataError(f"policy {self.policy[:80]!r} must be written name@channel, for example demo@stable")
        if self.policy_version < 0:
            raise DataError(f"policy_version {self.policy_version} must be 0 (the channel's) or a version")


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionLimits:
    """What the server holds a session to."""

    idle_timeout_s: float = 60.0
    """A stream silent for this long is closed."""
    max_instruction_bytes: int = 1024
    max_deadline_s: float = 60.0
    """Longest time an observation may wait for its chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionGrant:
    """The answer to a SessionRequest that was not refused."""

    policy_version: int
    horizon: int
    """H, actions per chunk."""
    context_steps: int
    """K, the observations that rebuild the policy's memory."""
    limits: SessionLimits
    spec_digest: str
    session_id: str = ""
    """Only within a process; a stream needs none."""
    service_id: str = ""
    """The same for all replicas of a service, and for no other service."""
    channel: str = ""
    """Where the version comes from: the channel that was asked for, or canary."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlanInProgress:
    """What a robot goes on doing while it waits for its next chunk, which is joined onto it."""

    observation_id: int
    """Of the chunk that is being executed."""
    consumed_steps: int
    """Its actions that were executed before this observation."""
    remaining: Array
    """(M, A) float32, its actions from this observation on."""
    committed_steps: int
    """The first of these that will be executed before the answer comes."""

    def __post_init__(self) -> None:
        if not 0 <= self.committed_steps <= len(self.remaining):
            raise DataError(f"committed_steps {self.committed_steps} must be within 0..{len(self.remaining)}, the rest")


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyState:
    """A policy's memory on its way to the robot and back; only the service that sealed it reads it."""

    num_steps: int
    """Observations of the episode that it has seen."""
    sealed: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """What became of one segment."""

    episode_id: str
    segment_index: int
    status: AckStatus
    reason: str = ""

    @property
    def key(self) -> SegmentKey:
        return self.episode_id, self.segment_index


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionInfo:
    """One version as the server lists it."""

    version: int
    parent: int
    spec: EnvSpec
    horizon: int
    loaded: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyInfo:
    """One reference that the server follows."""

    policy: str
    current_version: int
    versions: tuple[VersionInfo, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceHealth:
    """State of the replica that answered."""

    loaded: Mapping[tuple[str, int], int]
    """(policy name, version) -> sessions that run on it."""
    num_sessions: int
    problems: tuple[str, ...]
    """Why a newer version is not served; empty when all is well."""
    replica_id: str


def segment_key(segment: Segment) -> SegmentKey:
    """The identity under which a segment is stored once."""
    return segment.episode_id, segment.segment_index
