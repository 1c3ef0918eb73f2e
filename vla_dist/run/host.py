"""Where plain workers become Ray actors. The only loops without an end of their own live here."""

import logging
import os
import time
from collections.abc import Callable, Mapping

from vla_dist.core.errors import Unreachable, WaitTimeout
from vla_dist.core.protocols import Worker
from vla_dist.core.types import Metrics

_log = logging.getLogger(__name__)


class Board:
    """The newest metrics of every component, for people to look at; nothing depends on it.

    Lives in an actor of its own, so that a component's death leaves its last words readable.
    """

    def __init__(self) -> None:
        self._metrics: dict[str, dict[str, float]] = {}

    def post(self, component: str, metrics: Metrics) -> None:
        self._metrics[component] = {**metrics, "posted_unix_s": time.time()}

    def read(self) -> Mapping[str, Mapping[str, float]]:
        return self._metrics


class WorkerHost:
    """Builds a worker in the process that runs it, and steps it until it says ``done`` or a time is over.

    A killed host is started again by Ray and called again by the controller: every worker can be resumed.
    """

    def __init__(self, name: str, build: Callable[[], Worker], post: Callable[[str, Metrics], None]) -> None:
        self._name = name
        self._worker = build()
        self._post = post

    def run(self, *, max_seconds: float, pause_s: float = 0.0, patience_s: float = 60.0) -> Metrics:
        """Step until done, or until ``max_seconds`` are over; the last metrics.

        Args:
            pause_s: sleep after each step.
            patience_s: how long waits and lost connections may follow one another before the last one is raised.
        """
        end = time.monotonic() + max_seconds
        trouble_since: float | None = None
        metrics: Metrics = {}
        while time.monotonic() < end:
            try:
                metrics = self._worker.step()
                trouble_since = None
            except (Unreachable, WaitTimeout) as error:
                now = time.monotonic()
                trouble_since = now if trouble_since is None else trouble_since
                if now - trouble_since > patience_s:
                    raise
                _log.warning("%s waits: %s", self._name, error)
                time.sleep(0.5)
                continue
            self._post(self._name, metrics)
            if metrics.get("done"):
                break
            if pause_s:
                time.sleep(pause_s)
        return metrics

    def ping(self) -> int:
        """The process id, once the worker is built."""
        return os.getpid()

    def close(self) -> None:
        self._worker.close()
