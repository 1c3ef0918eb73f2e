"""Slots that Ray took for an actor which nobody knows any more.

Where the head dies while an actor waits for a slot, the raylet still holds the control service's old request. It grants
it later, to a service that has forgotten it: a worker process is set aside, never told what to do, and its slot is lost
until Ray is restarted on that node. Seen with Ray 2.60 when a replica waited at that moment: no other one could start.

The raylet's own report of its leases (``debug_state.txt``, every ten seconds) still names the actor, and the process
beside it still calls itself idle, which one that creates an actor never does.
"""

import re
import time
from pathlib import Path

import psutil

_REPORT = "debug_state.txt"
_LEASE = re.compile(r"actor_or_task(?P<what>\S+) pid=(?P<pid>\d+)")
_SESSION = "--session_dir="
_IDLE = "ray::IDLE"
_PATIENCE_S = 25.0
"""More than two of the raylet's reports, which may be old by one."""


class LeakedLeases:
    """Looks again and again, and ends what stayed idle under a lease."""

    def __init__(self, logs: Path | None = None, *, patience_s: float = _PATIENCE_S) -> None:
        """Args:
        logs: of one raylet; None: of each that runs on this machine.
        """
        self._logs = logs
        self._patience_s = patience_s
        self._since: dict[tuple[int, float], float] = {}
        """(process id, its start) -> when it was first seen idle under a lease."""

    def end(self) -> list[str]:
        """Kill the idle processes of leases that nobody uses, which gives their slots back; what they were held for."""
        now, found = time.monotonic(), self._idle_under_lease()
        self._since = {process: self._since.get(process, now) for process in found}
        ended = []
        for process, since in self._since.items():
            if now - since >= self._patience_s:
                try:
                    psutil.Process(process[0]).kill()
                except psutil.Error:
                    continue
                ended.append(found[process])
        return ended

    def _idle_under_lease(self) -> dict[tuple[int, float], str]:
        found = {}
        for what, pid in [lease for logs in self._all_logs() for lease in leases(_read(logs / _REPORT))]:
            try:
                process = psutil.Process(pid)
                if process.cmdline()[:1] == [_IDLE]:
                    found[pid, process.create_time()] = what
            except psutil.Error:  # it has ended, or is somebody else's
                continue
        return found

    def _all_logs(self) -> list[Path]:
        if self._logs is not None:
            return [self._logs]
        words = [
            p.info["cmdline"] or [] for p in psutil.process_iter(["name", "cmdline"]) if p.info["name"] == "raylet"
        ]
        return [Path(word.partition("=")[2]) / "logs" for line in words for word in line if word.startswith(_SESSION)]


def _read(report: Path) -> str:
    try:
        return report.read_text(errors="replace")
    except OSError:
        return ""  # Ray is just starting, or has gone


def leases(report: str) -> list[tuple[str, int]]:
    """(actor or task, process id) of each lease that a raylet's report names."""
    return [(match["what"], int(match["pid"])) for match in _LEASE.finditer(report)]
