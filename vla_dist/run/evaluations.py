"""Which version is judged on what, what came out, and a file of it that outlives the run."""

import dataclasses
import json
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError

from vla_dist.core.errors import WorkerFailed
from vla_dist.evaluation.statistics import SuccessRate
from vla_dist.evaluation.suite import EpisodeOutcome, SuiteConfig, overall
from vla_dist.run.comeback import COMEBACK_S, Comeback
from vla_dist.run.files import write_atomically

_MAX_DEATHS = 5
"""An evaluation that killed its worker this often is not tried again."""


class EvaluationBoard:
    """Hands suites to idle judges and keeps every outcome.

    A suite is cut into one job a task, so that several judges share it. A judge that dies takes one job with it, and
    that job is run again.
    """

    def __init__(self, judges: Sequence[Any], path: Path, *, comeback_s: float = COMEBACK_S) -> None:
        """Args:
        judges: Ray actors with VersionJudge's methods.
        path: JSON of all outcomes; what it holds already is not run again.
        comeback_s: how long a judge that died may take to be started again.
        """
        self._idle = deque(judges)
        self._path = path
        self._comeback_s = comeback_s
        self._jobs: deque[tuple[int, SuiteConfig]] = deque()
        self._running: dict[Any, tuple[Any, tuple[int, SuiteConfig]]] = {}
        self._outcomes: dict[str, list[EpisodeOutcome]] = {}
        self._returning: list[tuple[Any, Comeback]] = []
        self._asked: set[str] = set()
        self._deaths = 0
        if path.exists():
            stored = json.loads(path.read_text())
            self._outcomes = {key: [EpisodeOutcome(**row) for row in rows] for key, rows in stored.items()}

    def ask(self, version: int, suite: SuiteConfig) -> None:
        """Queue what is neither known nor asked for yet."""
        for job in _jobs(version, suite):
            key = _key(*job)
            if key not in self._outcomes and key not in self._asked:
                self._asked.add(key)
                self._jobs.append(job)

    def poll(self) -> None:
        """Collect what is finished and start what waits. Blocking: a few ms.

        Raises:
            WorkerFailed: judges keep dying.
        """
        if self._running:
            done, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
            for reference in done:
                judge, job = self._running.pop(reference)
                try:
                    self._outcomes[_key(*job)] = ray.get(reference)
                except RayActorError as error:
                    self._deaths += 1
                    if self._deaths > _MAX_DEATHS:
                        raise WorkerFailed(f"evaluation workers died {self._deaths} times: {error}") from error
                    self._jobs.appendleft(job)
                    self._returning.append((judge, Comeback("an evaluation worker", judge, timeout_s=self._comeback_s)))
                    continue
                self._idle.append(judge)
            if done:
                self._save()
        for judge, comeback in list(self._returning):
            if comeback.is_complete():
                self._returning.remove((judge, comeback))
                self._idle.append(judge)
        while self._idle and self._jobs:
            judge, job = self._idle.popleft(), self._jobs.popleft()
            self._running[judge.judge.remote(*job)] = (judge, job)

    @property
    def is_idle(self) -> bool:
        return not self._jobs and not self._running

    def outcomes(self, version: int, suite: SuiteConfig) -> list[EpisodeOutcome] | None:
        """All episodes of the suite, or None while one is missing."""
        keys = [_key(*job) for job in _jobs(version, suite)]
        if any(key not in self._outcomes for key in keys):
            return None
        return [outcome for key in keys for outcome in self._outcomes[key]]

    def rate(self, version: int, suite: SuiteConfig) -> SuccessRate | None:
        outcomes = self.outcomes(version, suite)
        return None if outcomes is None else overall(outcomes)

    def _save(self) -> None:
        rows = {key: [dataclasses.asdict(o) for o in outcomes] for key, outcomes in self._outcomes.items()}
        write_atomically(self._path, json.dumps(rows))


class NobodyJudges:
    """In place of an EvaluationBoard where there is no simulator: everything is judged at once, with no outcome."""

    is_idle = True

    def ask(self, version: int, suite: SuiteConfig) -> None: ...

    def poll(self) -> None: ...

    def outcomes(self, version: int, suite: SuiteConfig) -> list[EpisodeOutcome] | None:
        return None

    def rate(self, version: int, suite: SuiteConfig) -> SuccessRate | None:
        return None


def _jobs(version: int, suite: SuiteConfig) -> list[tuple[int, SuiteConfig]]:
    """One job a task; a wrong instruction needs the other tasks' words, so that suite stays whole."""
    if suite.mode == "wrong":
        return [(version, suite)]
    return [(version, dataclasses.replace(suite, tasks=(task,))) for task in suite.tasks]


def _key(version: int, suite: SuiteConfig) -> str:
    return f"v{version}/{suite.mode}/{suite.seed}/{suite.episodes_per_task}/{'+'.join(suite.tasks)}"
