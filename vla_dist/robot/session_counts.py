"""What became of a session's calls."""

from collections import deque
from dataclasses import dataclass, field

from vla_dist.core.types import Metrics


@dataclass(slots=True)
class SessionCounts:
    """Counts of one session. A failure is a call that ended without a chunk."""

    calls: int = 0
    failures: int = 0
    reconnects: int = 0
    renewals: int = 0
    late_answers: int = 0
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=10_000))
    """Of calls that ended with a chunk, by this machine's monotonic clock."""

    def metrics(self) -> Metrics:
        return {
            "calls": self.calls,
            "failures": self.failures,
            "reconnects": self.reconnects,
            "renewals": self.renewals,
            "late_answers": self.late_answers,
        }
