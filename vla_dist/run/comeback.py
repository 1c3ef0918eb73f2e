"""The wait for a killed actor that Ray is starting again."""

import time
from typing import Any

import ray
from ray.exceptions import RayActorError

from vla_dist.core.errors import WorkerFailed

COMEBACK_S = 120.0
"""Where the node is there still; a node that vanished takes its autoscaler minutes to replace."""


class Comeback:
    """Asks an actor with a ``ping`` until it answers: calls to one that is just being started fail, and such a failure
    says nothing about another death."""

    def __init__(self, name: str, actor: Any, *, timeout_s: float = COMEBACK_S) -> None:
        self._name = name
        self._timeout_s = timeout_s
        self._actor = actor
        self._since = time.monotonic()
        self._ping = actor.ping.remote()

    def is_complete(self) -> bool:
        """Never blocks. Raises WorkerFailed when ``timeout_s`` were not enough."""
        done, _ = ray.wait([self._ping], timeout=0)
        if not done:
            self._require_patience("no node takes it; does the cluster have room, and does its autoscaler live?")
            return False
        try:
            ray.get(self._ping)
        except RayActorError as error:
            self._require_patience(error)
            self._ping = self._actor.ping.remote()
            return False
        return True

    def _require_patience(self, reason: object) -> None:
        if time.monotonic() - self._since > self._timeout_s:
            raise WorkerFailed(f"{self._name} did not come back within {self._timeout_s:.0f} s: {reason}")
