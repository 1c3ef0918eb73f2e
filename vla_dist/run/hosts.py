"""Ray actors of a run, kept alive: a killed one is started again and goes on."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from vla_dist.core.errors import WorkerFailed
from vla_dist.core.protocols import Worker
from vla_dist.run.board import BoardLink
from vla_dist.run.comeback import COMEBACK_S, Comeback
from vla_dist.run.host import WorkerHost


class HostedWorker:
    """One WorkerHost in an actor of its own, whose ``run_as_actor`` is called again whenever the actor died.

    Workers can be resumed and what they send is stored exactly once, so calling again loses and repeats nothing.
    """

    def __init__(
        self,
        name: str,
        build: Callable[[], Sequence[Worker]],
        board: BoardLink,
        *,
        max_seconds: float,
        options: Mapping[str, Any],
        comeback_s: float = COMEBACK_S,
        max_deaths: int = 10,
    ) -> None:
        """Args:
        max_seconds: that its workers are stepped for.
        options: of the actor, as ``Placement`` gives them.
        comeback_s: how long it may take to be started again.
        max_deaths: on nodes that lived on. What a vanished node takes with it is nobody's fault and not counted.
        """
        self.name = name
        self.deaths = 0
        self._has_died = False
        self._comeback_s = comeback_s
        self.is_done = False
        self._max_seconds = max_seconds
        self._max_deaths = max_deaths
        self._closed = False
        # Two threads: a call to `stop` must get through while `run` is under way.
        host = ray.remote(WorkerHost).options(max_restarts=-1, max_concurrency=2, **options)
        self.actor: Any = host.remote(name, build, board)
        self._where: Any = None
        self._node = ""
        self._run = self._start()
        self._comeback: Comeback | None = None

    def poll(self) -> str | None:
        """Notice the end or a death; what happened in one sentence, if something did.

        Raises:
            WorkerFailed: it died too often, or its worker raised.
        """
        if self.is_done or self._closed:
            return None
        if self._comeback is not None:
            if not self._comeback.is_complete():
                return None
            note = self._forgive_vanished_node()
            self._comeback, self._run = None, self._start()
            return note
        self._learn_node()
        done, _ = ray.wait([self._run], timeout=0)
        if not done:
            return None
        try:
            is_reborn = ray.get(self._run)
        except RayActorError as error:
            note = self._count_death()
            if self.deaths > self._max_deaths:
                raise WorkerFailed(f"{self.name} died {self.deaths} times, more than allowed; last: {error}") from error
            self._comeback = Comeback(self.name, self.actor, timeout_s=self._comeback_s)
            return note
        except RayTaskError as error:
            raise WorkerFailed(f"{self.name} failed: {error.cause or error}") from error
        self.is_done = True
        # One that died before its run began showed no failure.
        return self._count_death() if is_reborn and not self._has_died else None

    def stop(self, *, timeout_s: float) -> None:
        """Let the steps under way end, then close."""
        if self._closed:
            return
        self.actor.stop.remote()
        ray.wait([self._run], timeout=timeout_s)
        self.close()

    def close(self) -> None:
        """End the process at once; nothing that was acknowledged is lost."""
        if not self._closed:
            self._closed = True
            ray.kill(self.actor, no_restart=True)

    def _start(self) -> Any:
        self._where, self._node = self.actor.node.remote(), ""
        return self.actor.run_as_actor.remote(max_seconds=self._max_seconds)

    def _count_death(self) -> str:
        self._has_died = True
        self.deaths += 1
        return f"{self.name} died and was started again ({self.deaths} of at most {self._max_deaths})"

    def _learn_node(self) -> None:
        """Which node it is on, once it says so."""
        if self._node or not ray.wait([self._where], timeout=0)[0]:
            return
        with contextlib.suppress(RayActorError):  # It died first, which its run tells.
            self._node = ray.get(self._where)

    def _forgive_vanished_node(self) -> str | None:
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        if not self._node or self._node in alive:
            return None
        self.deaths -= 1
        return f"{self.name} lost its node and goes on on another"
