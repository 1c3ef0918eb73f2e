"""Brings a server's append-only file to the disk, once a second, from outside the server.

With ``appendfsync everysec`` the server holds acknowledged writes back in its own memory, for up to two seconds, while
its background sync runs: killed then, it loses them. With ``appendfsync no`` it hands every write to the kernel before
it answers, where they outlive the server; what only the disk can outlive, a loss of power, is taken care of here.
"""

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

_INTERVAL_S = 1.0


class LogSync:
    """A thread that ends with the server."""

    def __init__(self, directory: Path, is_alive: Callable[[], bool]) -> None:
        """``directory`` holds the log's files, perhaps only later."""
        self._directory = directory
        self._is_alive = is_alive
        self._stop = threading.Event()
        threading.Thread(target=self._run, name="log-sync", daemon=True).start()

    def close(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(_INTERVAL_S) and self._is_alive():
            sync_log(self._directory)


def sync_log(directory: Path) -> None:
    """Return once what the kernel has of the log's newest part is on the disk; the server reports a full one."""
    parts = sorted(directory.glob("*.incr.aof"), key=lambda path: (len(path.name), path.name))
    for path in parts[-1:]:
        # The server may just have begun another part and removed this one.
        with contextlib.suppress(OSError):
            log = os.open(path, os.O_RDONLY)
            try:
                os.fdatasync(log) if hasattr(os, "fdatasync") else os.fsync(log)
            finally:
                os.close(log)
