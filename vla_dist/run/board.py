"""The newest metrics of every component, for people to look at; nothing depends on it."""

import contextlib
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import ActorAlreadyExistsError, GetTimeoutError

from vla_dist.core.errors import ResourceMissing
from vla_dist.core.types import Metrics

_NAMESPACE = "vla-dist"
_TIMEOUT_S = 10.0
_TAKEN_S = 90.0
"""For this long Ray may hold on to the board of a driver that was killed."""


class Board:
    """Lives in an actor of its own, so that a component's death leaves its last words readable."""

    def __init__(self) -> None:
        self._metrics: dict[str, dict[str, float]] = {}

    def post(self, component: str, metrics: Metrics) -> None:
        self._metrics[component] = {**metrics, "posted_unix_s": time.time()}

    def read(self) -> Mapping[str, Mapping[str, float]]:
        return self._metrics


class BoardLink:
    """A board by its name. It travels to other processes as that name: an actor handle among the arguments of a
    restartable actor could be lost before the restart."""

    def __init__(self, run_id: str, *, taken_s: float = _TAKEN_S) -> None:
        """Args:
        taken_s: how long to wait for a board of the same name to vanish.
        """
        self._name = f"board-{run_id}"
        self._taken_s = taken_s
        self._actor: Any = None
        self._last: Mapping[str, Mapping[str, float]] = {}

    def start(self, options: Mapping[str, Any] | None = None) -> None:
        """Args:
        options: of the actor, as ``Placement`` gives them.

        Raises:
            ResourceMissing: another driver has this run, so that this one must not go on.
        """
        options = {"num_cpus": 0, **(options or {})}
        make = ray.remote(Board).options(name=self._name, namespace=_NAMESPACE, **options)
        end = time.monotonic() + self._taken_s
        while True:
            try:
                self._actor = make.remote()
                return
            except ActorAlreadyExistsError as error:
                if time.monotonic() > end:
                    run = self._name.removeprefix("board-")
                    raise ResourceMissing(
                        f"another driver has the run {run}; wait for it, or stop its job ('ray job list' has its ID, "
                        "'ray job stop ID')"
                    ) from error
            time.sleep(1.0)

    def post(self, component: str, metrics: Metrics) -> None:
        """Send without waiting."""
        self._found().post.remote(component, dict(metrics))

    def read(self) -> Mapping[str, Mapping[str, float]]:
        """What was read last where the board does not answer in time: a busy machine is no reason to end a run."""
        with contextlib.suppress(GetTimeoutError):
            self._last = ray.get(self._found().read.remote(), timeout=_TIMEOUT_S)
        return self._last

    def __getstate__(self) -> str:
        return self._name

    def __setstate__(self, name: str) -> None:
        self._name, self._actor, self._last, self._taken_s = name, None, {}, _TAKEN_S

    def _found(self) -> Any:
        if self._actor is None:
            self._actor = ray.get_actor(self._name, namespace=_NAMESPACE)
        return self._actor


class BoardEntry:
    """A sink that shows the newest metrics of one component on a board."""

    def __init__(self, board: BoardLink, component: str) -> None:
        self._board = board
        self._component = component

    def __call__(self, metrics: Metrics) -> None:
        self._board.post(self._component, metrics)

    def close(self) -> None:
        """What was posted last stays readable."""
