"""Where plain workers become Ray actors. The only loops without an end of their own live here."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import ray

from vla_dist.core.errors import Unreachable, WaitTimeout
from vla_dist.core.protocols import Worker
from vla_dist.core.types import Array
from vla_dist.envs.instructions import Split
from vla_dist.evaluation.suite import EpisodeOutcome, SuiteConfig
from vla_dist.run.board import BoardLink
from vla_dist.run.composition.place import Place
from vla_dist.run.composition.rollouts import build_judge
from vla_dist.run.priority import make_way

_log = logging.getLogger(__name__)

_PAUSE_S = 0.5
"""Before the store is tried again."""


class WorkerHost:
    """Builds workers in the process that runs them, and steps each in a thread until it says ``done`` or time is over.

    A killed host is started again by Ray and called again by the controller: every worker can be resumed.
    """

    def __init__(self, name: str, build: Callable[[], Sequence[Worker]], board: BoardLink) -> None:
        make_way()
        self._name = name
        self._workers = build()
        self._board = board
        self._stop = threading.Event()

    def run(self, *, max_seconds: float, pause_s: float = 0.0, patience_s: float = 180.0, closes: bool = False) -> None:
        """Step every worker until it is done, the host is told to stop, or ``max_seconds`` are over.

        Args:
            pause_s: sleep after each step.
            patience_s: how long waits and lost connections may follow one another before the last one is raised.
            closes: each worker at its end, for a process that goes on. Its own thread does it: what draws images may
                only be closed where it drew.
        """
        end = time.monotonic() + max_seconds
        with ThreadPoolExecutor(len(self._workers), thread_name_prefix=self._name) as threads:
            runs = [
                threads.submit(self._run_one, f"{self._name}/{index}", worker, end, pause_s, patience_s, closes)
                for index, worker in enumerate(self._workers)
            ]
            for run in as_completed(runs):
                if run.exception() is not None:
                    self._stop.set()
        for run in runs:
            run.result()

    def run_as_actor(self, *, max_seconds: float) -> bool:
        """``run``; whether this process stands in for one that died.

        Ray sends a call that had not begun to the next process without a word.
        """
        self.run(max_seconds=max_seconds)
        return bool(ray.get_runtime_context().was_current_actor_reconstructed)

    def stop(self) -> None:
        """End ``run`` after the steps that are under way."""
        self._stop.set()

    def ping(self) -> int:
        """The process id, once the workers are built."""
        return os.getpid()

    def node(self) -> str:
        """Ray's id of the node it is on."""
        return ray.get_runtime_context().get_node_id()

    def _run_one(self, name: str, worker: Worker, end: float, pause_s: float, patience_s: float, closes: bool) -> None:
        with contextlib.closing(worker) if closes else contextlib.nullcontext():
            self._step(name, worker, end, pause_s, patience_s)

    def _step(self, name: str, worker: Worker, end: float, pause_s: float, patience_s: float) -> None:
        trouble_since: float | None = None
        while time.monotonic() < end and not self._stop.is_set():
            try:
                metrics = worker.step()
                trouble_since = None
            except (Unreachable, WaitTimeout) as error:
                now = time.monotonic()
                trouble_since = now if trouble_since is None else trouble_since
                if now - trouble_since > patience_s:
                    raise
                _log.warning("%s waits: %s", name, error)
                self._stop.wait(_PAUSE_S)
                continue
            self._board.post(name, metrics)
            if metrics.get("done"):
                break
            self._stop.wait(pause_s)


class JudgeHost:
    """A VersionJudge in the process that runs it."""

    def __init__(self, place: Place, instructions: Split = "training") -> None:
        make_way()
        self._judge = build_judge(place, instructions=instructions)

    def ping(self) -> int:
        """The process id, once the environments are built."""
        return os.getpid()

    def judge(self, version: int, suite: SuiteConfig, *, patience_s: float = 180.0) -> list[EpisodeOutcome]:
        """Blocking: also while the registry is away, for ``patience_s`` at most; then raises Unreachable."""
        end = time.monotonic() + patience_s
        while True:
            try:
                return self._judge.judge(version, suite)
            except Unreachable:
                if time.monotonic() > end:
                    raise
                time.sleep(_PAUSE_S)

    def film(self, version: int, suite: SuiteConfig, every: int) -> list[tuple[str, list[Array]]]:
        return self._judge.film(version, suite, every=every)
