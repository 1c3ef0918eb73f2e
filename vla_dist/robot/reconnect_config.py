"""How a robot's session survives its server and its streams."""

from dataclasses import dataclass

from vla_dist.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconnectConfig:
    """How long a robot keeps trying before it gives an episode up."""

    budget_s: float = 20.0
    """Of one outage, from the break to the first granted session."""
    attempt_s: float = 5.0
    """A session that is not granted by then is asked for again: a proxy may leave a stream hanging in silence."""
    first_pause_s: float = 0.02
    """Between attempts; doubles up to ``longest_pause_s``."""
    longest_pause_s: float = 0.5
    stall_s: float = 3.0
    """A stream that leaves an observation unanswered for this much longer than its deadline counts as broken."""
    renew_every_s: float = 60.0
    """Age at which a stream is replaced by a new one, made before the old one is left: a deploy cuts every stream of a
    proxy some time after it, 120 s by default. Robots renew at different times, 10 % around this."""

    def __post_init__(self) -> None:
        if not 0 < self.first_pause_s <= self.longest_pause_s <= self.budget_s:
            raise ConfigError(
                f"first_pause_s {self.first_pause_s}, longest_pause_s {self.longest_pause_s} and budget_s "
                f"{self.budget_s} must be positive and in this order"
            )
        if min(self.attempt_s, self.stall_s, self.renew_every_s) <= 0:
            raise ConfigError(
                f"attempt_s {self.attempt_s}, stall_s {self.stall_s} and renew_every_s {self.renew_every_s} must be "
                "positive"
            )
