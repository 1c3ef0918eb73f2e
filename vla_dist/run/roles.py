"""What a node is for, as a custom resource of Ray, and which part of a run wants which.

A node says with ``rollout``, ``learner``, ``serving`` and ``gateway`` how many parts of that kind it takes. A role that
no node of the cluster has, nor could have, is not asked for: on a laptop, and on a cluster that knows nothing of
vla-dist, every part goes wherever there is a CPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from vla_dist.core.errors import ConfigError

Role = Literal["rollout", "learner", "serving", "gateway"]
ROLLOUT: Role = "rollout"
LEARNER: Role = "learner"
SERVING: Role = "serving"
GATEWAY: Role = "gateway"
ROLES: tuple[Role, ...] = (ROLLOUT, LEARNER, SERVING, GATEWAY)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementSettings:
    """What the parts of a run reserve, and how the learner's ranks lie to each other."""

    rollout_cpus: float = 1.0
    """Of one rollout worker, judge, or process of simulated robots."""
    learner_cpus: float = 1.0
    """Of one rank."""
    learner_gpus: float = 1.0
    """Of one rank, where ``learner.use_gpu``. Less than 1 shares a GPU with replicas, or with another run."""
    replica_cpus: float = 1.0
    replica_gpus: float = 0.0
    """Of one serving replica; 0.25 puts four beside each other on one GPU."""
    learner_strategy: Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"] = "PACK"
    """All ranks start together or not at all; PACK on few nodes, STRICT_PACK on one, SPREAD on many."""

    def __post_init__(self) -> None:
        for name in ("rollout_cpus", "learner_cpus", "replica_cpus"):
            if getattr(self, name) < 0:
                raise ConfigError(f"placement.{name} {getattr(self, name)} must not be negative")
        for name in ("learner_gpus", "replica_gpus"):
            share = getattr(self, name)
            if share < 0 or (share > 1 and share != int(share)):
                raise ConfigError(
                    f"placement.{name} {share} must be a part of one GPU (0.25), or a whole number of them"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """So many processes of one kind, each of which takes one slot of its role."""

    name: str
    role: Role
    count: int
    cpus: float
    gpus: float = 0.0
    is_late: bool = False
    """Starts when the rollout workers have ended, in their place."""


def largest_load(parts: Iterator[Part], role: Role) -> int:
    """Slots of a role that are taken at once."""
    early = late = 0
    for part in parts:
        if part.role == role:
            late += part.count if part.is_late else 0
            early += 0 if part.is_late else part.count
    return max(early, late)
