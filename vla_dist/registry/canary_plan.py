"""What a canary is, and what serving asks of whoever keeps it."""

import hashlib
from dataclasses import dataclass, field
from typing import Literal, Protocol

from vla_dist.core.errors import ConfigError
from vla_dist.registry.sequential import CanaryRule, Verdict

PlanState = Literal["running", "promoted", "rolled_back"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryPlan:
    """One canary: a version beside the incumbent, for a share of the robots."""

    name: str
    version: int
    incumbent: int
    share: float
    """Of the robots; which ones follows from their ids, so that each keeps its channel."""
    rule: CanaryRule = field(default_factory=CanaryRule)
    plan_id: str = ""
    state: PlanState = "running"
    reason: str = ""
    started_unix_s: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"share {self.share} must be above 0 and at most 1, for example 0.1")
        if self.version == self.incumbent:
            raise ConfigError(f"version {self.version} of {self.name} is the incumbent itself; name another version")

    @property
    def is_running(self) -> bool:
        return self.state == "running"

    def takes(self, robot_id: str) -> bool:
        """Whether this robot runs the canary. A larger share only adds robots."""
        return sticky_share(f"{self.name}:{robot_id}") < self.share


class CanaryStore(Protocol):
    """What serving asks of it."""

    def plan(self, name: str) -> CanaryPlan | None:
        """The newest plan, running or ended."""
        ...

    def record(self, name: str, version: int, episode_id: str, *, success: bool) -> Verdict | None:
        """Count an episode once; what the running plan's episodes say now, None where none runs."""
        ...

    def end(self, name: str, state: PlanState, reason: str, *, who: str, plan_id: str = "") -> bool:
        """End the running plan; whether there was one."""
        ...


def sticky_share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone and is spread evenly."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
