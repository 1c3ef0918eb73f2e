"""What a policy service admits, how long its chunks hold, and what robots do after that."""

from dataclasses import dataclass, field

from vla_dist.core.errors import ConfigError
from vla_dist.core.types import FALLBACKS, Fallback
from vla_dist.protocol.records import SessionLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """Admission and dead-man settings."""

    max_sessions: int = 256
    """Robots at once; the next one is refused. Serve's own limit does not hold for streams."""
    max_sessions_per_robot: int = 4
    """Of one named robot; more than one, since a stream is renewed before the old one ends."""
    max_observations_per_s: float = 2000.0
    """Of one session; what comes faster is refused and not computed."""
    max_opens_per_s: float = 200.0
    """Sessions begun a second, all robots together."""
    max_unary_calls_per_s: float = 500.0
    """Handshakes and answers without a session, all callers together; such an answer computes a whole history."""
    state_every_s: float = 2.0
    """Control time between two states that an episodic policy's robots are given to keep."""
    limits: SessionLimits = field(default_factory=SessionLimits)
    grace_ms: float = 100.0
    """A chunk of H actions is valid for H control periods and this much more."""
    fallback: Fallback = "hold"
    """What a robot does when its chunk has run out of time."""

    def __post_init__(self) -> None:
        if self.max_sessions < 1:
            raise ConfigError(f"max_sessions {self.max_sessions} must be at least 1")
        if self.fallback not in FALLBACKS:
            raise ConfigError(f"fallback {self.fallback!r} must be one of {', '.join(FALLBACKS)}")
        rates = self.max_observations_per_s, self.max_opens_per_s, self.max_unary_calls_per_s, self.state_every_s
        if self.max_sessions_per_robot < 1 or min(rates) <= 0:
            raise ConfigError(
                f"max_sessions_per_robot {self.max_sessions_per_robot} must be at least 1, and "
                f"max_observations_per_s, max_opens_per_s, max_unary_calls_per_s, state_every_s {rates} positive"
            )
        if self.grace_ms < 0:
            raise ConfigError(f"grace_ms {self.grace_ms} must not be negative")
