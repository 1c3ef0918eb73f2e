"""The wait for a killed actor that Ray is starting again."""

import time
from typing import Any

import ray
from ray.exceptions import RayActorError

from vla_dist.core.errors import WorkerFailed

_TIMEOUT_S = 120.0


class Comeback:
    """Asks an actor with a ``ping`` until it answers: calls to one that is just being started fail, and such a failure
    says nothing about another death."""

    def __init__(self, name: str, actor: Any) -> None:
        self._name = name
        self._actor = actor
        self._since = time.monotonic()
        self._ping = actor.ping.remote()

    def is_complete(self) -> bool:
        """Never blocks. Raises WorkerFailed when two minutes were not enough."""
        done, _ = ray.wait([self._ping], timeout=0)
        if not done:
            return False
        try:
            ray.get(self._ping)
        except RayActorError as error:
            if time.monotonic() - self._since > _TIMEOUT_S:
                raise WorkerFailed(f"{self._name} did not come back within {_TIMEOUT_S:.0f} s: {error}") from error
            self._ping = self._actor.ping.remote()
            return False
        return True
