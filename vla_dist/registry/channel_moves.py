"""What may be done with channels, wherever the registry lies: in this process, or behind a server."""

import getpass
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vla_dist.registry.canary_plan import CanaryPlan
from vla_dist.registry.sequential import CanaryRule, Tally, Verdict, success_bounds

STABLE, CANARY, SHADOW = "stable", "canary", "shadow"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelReport:
    """What one policy's channels are and how its newest canary does."""

    name: str
    channels: dict[str, int]
    plan: CanaryPlan | None
    canary: Tally
    incumbent: Tally
    verdict: Verdict | None
    """Of a running plan."""

    def bounds(self, tally: Tally) -> tuple[float, float]:
        confidence = 0.95 if self.plan is None else self.plan.rule.confidence
        return success_bounds(tally, confidence=1 - (1 - confidence) / 2)


class ChannelMoves(Protocol):
    """Every move, and every move that is refused, goes into the audit log with ``who``.

    A reference is ``name@17`` or ``name@channel``. All raise NotFound where there is no such name, channel or version.
    """

    def reports(self, name: str = "") -> Sequence[ChannelReport]:
        """Of one policy; of all where the name is empty."""
        ...

    def audit(self, max_entries: int) -> Sequence[dict[str, Any]]:
        """The newest entries, oldest of them first."""
        ...

    def begin_canary(self, reference: str, *, share: float, rule: CanaryRule, who: str) -> CanaryPlan:
        """Give a version to a share of the robots.

        Raises:
            MoveRefused: it is the stable one, or its contract is another.
        """
        ...

    def promote(self, reference: str, *, force: str = "", who: str) -> tuple[int, str]:
        """Point ``stable`` at a version that its canary has shown to be no worse; the version, and why.

        Args:
            force: a reason to promote without that evidence.

        Raises:
            MoveRefused: the evidence is missing, and no reason was given.
        """
        ...

    def set_shadow(self, reference: str, *, who: str) -> int:
        """Let a version compute beside the stable one, unheard; the version."""
        ...

    def roll_back(self, name: str, *, reason: str, who: str) -> str:
        """End the canary that runs, or else point ``stable`` at what it pointed at before; what was done."""
        ...


def person() -> str:
    """User and machine, for the audit log."""
    return f"{getpass.getuser()}@{socket.gethostname()}"
