"""What the fleet's service carries beside segments, as both ends of the wire hold it."""

from dataclasses import dataclass

from vla_dist.core.errors import DataError
from vla_dist.core.types import Source
from vla_dist.protocol.records import FleetCommand


@dataclass(frozen=True, slots=True, kw_only=True)
class RobotClaim:
    """Who uploads. Two robots with one identity are told apart by their spools."""

    robot_id: str
    spool_id: str
    host: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Intervention:
    """A person had taken over from ``first_step`` to before ``end_step``."""

    operator: str
    first_step: int
    end_step: int

    def __post_init__(self) -> None:
        if not 0 <= self.first_step < self.end_step:
            raise DataError(
                f"intervention by {self.operator!r} from step {self.first_step} to before {self.end_step}: the end "
                "must lie after the first step"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeRecord:
    """What is known of an episode beside its steps."""

    episode_id: str
    robot_id: str
    task: str
    source: Source
    num_steps: int
    num_segments: int
    success: bool
    labelled_by: str = ""
    """Who said whether it was a success; empty: the robot or simulator itself."""
    partial: str = ""
    """Why it ended before its end; empty: it did not."""
    interventions: tuple[Intervention, ...] = ()
    notes: tuple[str, ...] = ()
    lease_id: str = ""
    """Of the assignment it was recorded for; empty: none."""
    started_unix_s: float = 0.0
    """By the robot's wall clock, which may be wrong."""
    duration_s: float = 0.0
    """By its monotonic clock."""
    problems: tuple[str, ...] = ()
    """What the recorder noticed: a clock that jumped, a rate that was not the contract's."""
    content_sha256: str = ""
    """Of the numbers of all steps, see ``episode_content``."""
    frames_sha256: str = ""
    """Of the frames as they were sent; empty without cameras."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """One episode to record."""

    lease_id: str
    task: str
    source: Source
    instruction: str = ""
    """Empty: the robot's own words for the task."""
    policy: str = ""
    """``name@channel``, where a policy is to act."""
    seed: int = 0
    lease_s: float = 60.0
    """The lease ends this long after it was last renewed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NextTask:
    """The answer to a robot that asks what to do."""

    command: FleetCommand
    assignment: Assignment | None = None
    wait_s: float = 0.0
    """Without an assignment: ask again after this."""
    reason: str = ""
