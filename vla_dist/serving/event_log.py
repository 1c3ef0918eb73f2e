"""What happened, one JSON line each, in a file that cannot grow without end: who was refused, how a shadow differs."""

import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

from vla_dist.core.errors import ConfigError

_log = logging.getLogger(__name__)


class EventLog:
    """Appends to ``path``; several processes may share it, since a line is written in one call.

    When the file passes ``max_bytes`` it becomes ``<path>.1``, in place of the one before.

    Args:
        path: None: the process's own log only.
        max_per_s: entries written; more of them are counted and told with the next, so that a flood of refusals
            cannot push out what came before it.
    """

    def __init__(self, path: Path | None, *, max_bytes: int = 16 * 2**20, max_per_s: float = 20.0) -> None:
        if max_bytes < 4096 or max_per_s <= 0:
            raise ConfigError(f"max_bytes {max_bytes} must be at least 4096 and max_per_s {max_per_s} positive")
        self.path = path
        self._max_bytes = max_bytes
        self._max_per_s = max_per_s
        self._tokens = max_per_s
        self._refilled = time.monotonic()
        self._num_left_out = 0
        self._lock = threading.Lock()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, event: str, **fields: Any) -> None:
        """One entry. A disk that refuses it is told in the process's log: a robot must not stop for it."""
        with self._lock:
            now = time.monotonic()
            self._tokens = min(self._max_per_s, self._tokens + (now - self._refilled) * self._max_per_s)
            self._refilled = now
            if self._tokens < 1:
                self._num_left_out += 1
                return
            self._tokens -= 1
            if self._num_left_out:
                fields["left_out_before"] = self._num_left_out
                self._num_left_out = 0
            entry = {"unix_s": round(time.time(), 3), "event": event, **fields}
            line = json.dumps(entry, default=str)[:8192] + "\n"
            _log.info("%s", line.rstrip())
            if self.path is not None:
                self._append(self.path, line.encode())

    def _append(self, path: Path, line: bytes) -> None:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(descriptor, line)
                too_long = os.fstat(descriptor).st_size > self._max_bytes
            finally:
                os.close(descriptor)
            if too_long:
                path.replace(path.with_name(f"{path.name}.1"))
        except OSError as error:
            _log.warning("the event log %s takes no entry: %s", path, error)


def read_events(path: Path) -> list[dict[str, Any]]:
    """Entries of the log at ``path``, oldest first, the turned file before the current one. A torn line is left out."""
    entries: list[dict[str, Any]] = []
    for file in (path.with_name(f"{path.name}.1"), path):
        if not file.exists():
            continue
        for line in file.read_text(errors="replace").splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                continue
    return entries
