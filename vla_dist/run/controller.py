"""One run from start to end: places the parts, watches them, judges the versions, writes the report.

| part | meets others in | when it dies |
|---|---|---|
| rollout workers | replay | Ray starts the actor again, it skips what is stored |
| archiver | replay | Ray starts the actor again, it finishes the file that was planned |
| learner | replay, registry | Ray Train starts it again from its last checkpoint |
| replicas | registry, replay (ingest) | Serve starts another; robots reconnect and rebuild their state |
| robots | gRPC | started again with new episodes |
| judges | registry | the job is run again |
| embedded Redis | - | its keeper starts it again; everybody who needs it waits |
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayTaskError

from vla_dist.core.errors import ResourceMissing, Unreachable, WaitTimeout
from vla_dist.core.protocols import Worker
from vla_dist.evaluation.suite import SuiteConfig
from vla_dist.replay.archive.archiver import Archiver
from vla_dist.replay.limiter import LimiterConfig
from vla_dist.run.board import BoardLink
from vla_dist.run.comeback import COMEBACK_S
from vla_dist.run.composition.place import Place, public_settings
from vla_dist.run.composition.rollouts import build_robots, build_rollout_worker
from vla_dist.run.composition.stores import build_archivers, build_registry, build_table
from vla_dist.run.evaluations import EvaluationBoard, NobodyJudges
from vla_dist.run.files import EVALUATIONS, EVENTS, FILM
from vla_dist.run.host import JudgeHost
from vla_dist.run.hosts import HostedWorker
from vla_dist.run.memory import MemoryWatch
from vla_dist.run.metrics_log import MetricsLog
from vla_dist.run.placement import Placement
from vla_dist.run.roles import ROLLOUT
from vla_dist.run.run_gauges import RunGauges
from vla_dist.run.serve_app import ServingHandle
from vla_dist.run.serving_start import ServingStart, serve_place
from vla_dist.run.status import RunStatus
from vla_dist.run.summary import RunSummary
from vla_dist.run.telemetry import Telemetry
from vla_dist.run.training import Training

_TICK_S = 0.5
_TABLE_SEED = 3000
_FIRST_VERSION_TIMEOUT_S = 300.0
_RUN_TIMEOUT_S = 24 * 3600.0
_FILM_EVERY = 4
"""Steps of the simulator for each frame of the film."""
_FILM_TIMEOUT_S = 300.0
_ARCHIVE_TIMEOUT_S = 300.0
_CLUSTER_COMEBACK_S = 1800.0
"""What an autoscaler may take to replace a spot node."""
_ARCHIVER, _FLEET = "archiver", "fleet"
_ENDLESS = {_ARCHIVER, _FLEET}
"""Hosts whose work does not end by itself."""


class RunController:
    """Drives one run on a Ray that is initialised, with a store that answers."""

    def __init__(
        self,
        place: Place,
        placement: Placement,
        on_status: Callable[[RunStatus], None],
        *,
        started_s: float,
        store_notes: Callable[[], tuple[str, ...]] = tuple,
    ) -> None:
        """Args:
        placement: what nodes there are for its parts.
        started_s: ``time.monotonic()`` when the run began, before Ray and the store did.
        store_notes: what happened to the store so far.
        """
        self._place = place
        self._config = place.config
        self._placement = placement
        self._comeback_s = _CLUSTER_COMEBACK_S if placement.is_cluster else COMEBACK_S
        self._on_status = on_status
        self._registry = build_registry(place)
        self._table = build_table(place, seed=_TABLE_SEED)
        self._ratio_is_lifted = False
        self._notes: list[str] = []
        self._phase = "starting"
        self._phase_seconds: dict[str, float] = {}
        self._store_notes = store_notes
        self._started_s = self._phase_started_s = started_s
        self._hosts: list[HostedWorker] = []
        self._judged: EvaluationBoard | NobodyJudges | None = None
        self._archivers: list[Archiver] = []
        self._archive_trouble: Exception | None = None
        self._known_versions: set[int] = set()

    def execute(self) -> RunSummary:
        """The whole run. Everything it started is gone when this returns or raises."""
        with contextlib.ExitStack() as stack:
            self._memory = stack.enter_context(contextlib.closing(MemoryWatch(os.getpid())))
            board = BoardLink(self._place.run_id)
            board.start(self._placement.beside_driver(cpus=0))
            self._gauges = RunGauges(self._place.run_id)
            self._telemetry = Telemetry(self._place, self._table, self._registry, board)
            stack.callback(self._close_hosts)
            self._start_archiver(board, stack)
            self._start_rollouts(board)
            log = MetricsLog(
                board,
                self._place.run_dir / EVENTS,
                run_id=self._place.run_id,
                settings=public_settings(self._config),
            )
            self._training = stack.enter_context(contextlib.closing(Training(self._place, self._placement, log)))
            self._enter("collecting")
            # Serve takes as long to start as the learner to publish version 1: both at once.
            starting = stack.enter_context(
                contextlib.closing(ServingStart(partial(serve_place, self._place, self._placement)))
            )
            patience_s = max(_FIRST_VERSION_TIMEOUT_S, self._config.serving.startup_timeout_s)
            self._tick_until(lambda: starting.is_done, timeout_s=patience_s, what="the policy service")
            self._start_fleet(board, starting.result())
            self._enter("training")
            self._tick_until(self._is_trained)
            self._enter("judging")
            self._close_fleet()
            self._ask(self._final_suites())
            self._tick_until(lambda: self._judges().is_idle)
            self._finish_archive()
            self._enter("reporting")
            self._film()
            summary = self._summarise()
            summary.write()
            return summary

    def _start_archiver(self, board: BoardLink, stack: contextlib.ExitStack) -> None:
        """Before anything is appended, so that nothing can be evicted unseen."""
        if self._config.replay.archive:
            # Built here as well: a location that cannot work is refused in its own words, and the end needs them.
            self._archivers = [stack.enter_context(contextlib.closing(one)) for one in build_archivers(self._place)]
            build = partial(build_archivers, self._place)
            self._host(_ARCHIVER, build, board, self._placement.beside_driver(cpus=1))

    def _finish_archive(self) -> None:
        """Nothing is appended any more: what is complete is archived, whatever became of the host."""
        if not self._archivers:
            return
        self._enter("archiving")
        for host in self._hosts:
            if host.name == _ARCHIVER:
                host.stop(timeout_s=20.0)
        try:
            self._tick_until(self._is_archived, timeout_s=_ARCHIVE_TIMEOUT_S, what="the rest of the archive")
            for archiver in self._archivers:
                archiver.release()
        except (Unreachable, WaitTimeout) as error:
            self._notes.append(f"the archive is not complete: {self._archive_trouble or error}")

    def _is_archived(self) -> bool:
        try:
            for archiver in self._archivers:
                archiver.flush(timeout_s=_TICK_S)
        except (Unreachable, WaitTimeout) as error:
            self._archive_trouble = error
            return False
        return True

    def _start_rollouts(self, board: BoardLink) -> None:
        for index in range(self._config.rollout.num_workers):
            name = f"rollout-{index}"
            build = partial(build_rollout_worker, self._place, index)
            self._host(name, build, board, self._rollout_options())

    def _host(
        self, name: str, build: Callable[[], Sequence[Worker]], board: BoardLink, options: Mapping[str, Any]
    ) -> None:
        self._hosts.append(
            HostedWorker(name, build, board, max_seconds=_RUN_TIMEOUT_S, options=options, comeback_s=self._comeback_s)
        )

    def _rollout_options(self) -> Mapping[str, Any]:
        """Of whoever steps a simulator."""
        return self._placement.options(ROLLOUT, cpus=self._config.placement.rollout_cpus)

    def _start_fleet(self, board: BoardLink, serving: ServingHandle) -> None:
        if self._config.fleet.num_robots:
            build = partial(build_robots, self._place, serving.address)
            self._host(_FLEET, build, board, self._rollout_options())

    def _close_fleet(self) -> None:
        """Robots finish their episode, so that nothing they did is cut off."""
        for host in self._hosts:
            if host.name == _FLEET:
                host.stop(timeout_s=20.0)

    def _close_hosts(self) -> None:
        for host in self._hosts:
            host.close()

    def _judges(self) -> EvaluationBoard | NobodyJudges:
        """Started at first use: collecting is over then, and its memory and cores are free."""
        if not self._config.env.has_simulator:
            self._judged = NobodyJudges()
        elif self._judged is None:
            make = ray.remote(JudgeHost).options(max_restarts=-1, **self._rollout_options())
            actors = [make.remote(self._place) for _ in range(self._config.evaluation.num_workers)]
            path = self._place.run_dir / EVALUATIONS
            self._judged = EvaluationBoard(actors, path, comeback_s=self._comeback_s)
        return self._judged

    def _ask(self, suites: list[SuiteConfig]) -> None:
        for suite in suites:
            self._judges().ask(max(self._known_versions), suite)

    def _suite(self) -> SuiteConfig:
        settings = self._config.evaluation
        return SuiteConfig(
            tasks=self._config.env.tasks, episodes_per_task=settings.episodes_per_task, seed=settings.seed
        )

    def _final_suites(self) -> list[SuiteConfig]:
        """The last version on more episodes, and the language control in the shared scene."""
        settings, env = self._config.evaluation, self._config.env
        final = dataclasses.replace(self._suite(), episodes_per_task=settings.final_episodes_per_task)
        if not env.language_tasks:
            return [final]
        scene = dataclasses.replace(final, tasks=env.language_tasks)
        return [final, dataclasses.replace(scene, mode="zeroed"), dataclasses.replace(scene, mode="wrong")]

    def _is_trained(self) -> bool:
        if not self._training.is_done or not self._ratio_is_lifted:
            return False
        for host in self._hosts:
            if host.name not in _ENDLESS and not host.is_done:
                return False
        # Every version was queued when it was first seen; the last one is judged by the final suite.
        return self._judges().is_idle

    def _tick_until(
        self, condition: Callable[[], bool], *, timeout_s: float = _RUN_TIMEOUT_S, what: str = "the run"
    ) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > end:
                raise WaitTimeout(
                    f"{what} did not come within {timeout_s:.0f} s; the logs are in {self._place.run_dir}"
                )
            self._tick()
            time.sleep(_TICK_S)
        self._tick()

    def _tick(self) -> None:
        self._training.raise_if_failed()
        for host in self._hosts:
            note = host.poll()
            if note:
                self._notes.append(note)
            if host.is_done:
                host.close()
        self._lift_ratio()
        self._notice_versions()
        if self._judged is not None:
            self._judged.poll()
        status = self.status()
        self._gauges.show(status)
        self._on_status(status)

    @property
    def _is_collecting(self) -> bool:
        return any(host.name.startswith("rollout") and not host.is_done for host in self._hosts)

    def _lift_ratio(self) -> None:
        """Where one side has ended, the other would wait for it for ever with the ratio in force: inserts once nobody
        samples any more, and a learner that had to make updates again once nobody inserts.
        """
        # Without a teacher it is robots elsewhere that insert, and nobody knows when they end.
        is_quota = self._config.rollout.teacher != "none" and not self._config.fleet.num_robots
        nobody_inserts = is_quota and bool(self._hosts) and not self._is_collecting
        if self._ratio_is_lifted or not (nobody_inserts or self._training.is_done):
            return
        limiter = LimiterConfig(min_steps=self._config.replay.min_steps, samples_per_insert=None)
        with contextlib.suppress(Unreachable, WaitTimeout):  # Asked again at the next tick.
            self._table.override_limiter(limiter)
            self._ratio_is_lifted = True

    def _notice_versions(self) -> None:
        published = self._telemetry.published()
        self._known_versions |= published.keys()
        if self._is_collecting or not published:
            return
        last = self._config.learner.total_updates
        for version, updates in published.items():
            if updates != last:
                self._judges().ask(version, self._suite())

    def status(self) -> RunStatus:
        judged, suite = self._judged, self._suite()
        rates = {}
        for version in self._known_versions if judged else ():
            rate = judged.rate(version, suite) or judged.rate(version, self._final_suites()[0])  # type: ignore[union-attr]
            if rate is not None:
                rates[version] = rate
        return self._telemetry.status(
            phase=self._phase,
            elapsed_s=time.monotonic() - self._started_s,
            memory_mb=self._memory.current_bytes / 2**20,
            rates=rates,
            notes=(*self._notes, *self._store_notes()),
        )

    def _enter(self, phase: str) -> None:
        now = time.monotonic()
        self._phase_seconds[self._phase] = now - self._phase_started_s
        self._phase, self._phase_started_s = phase, now

    def _film(self) -> None:
        """A few episodes of the last version, where this machine can draw."""
        if not self._config.env.has_simulator:
            return
        from vla_dist.evaluation.figures import write_film

        tasks = (*self._config.env.tasks[:2], *self._config.env.language_tasks)
        suite = dataclasses.replace(self._suite(), tasks=tuple(dict.fromkeys(tasks)))
        judge: Any = ray.remote(JudgeHost).options(**self._rollout_options()).remote(self._place)
        try:
            scenes = ray.get(judge.film.remote(max(self._known_versions), suite, _FILM_EVERY), timeout=_FILM_TIMEOUT_S)
            write_film(self._place.run_dir / FILM, scenes)
        except RayTaskError as error:
            if not isinstance(error.cause, ResourceMissing):
                raise
            self._notes.append(f"no film: {error.cause}")
        finally:
            ray.kill(judge)

    def _archive_counts(self) -> dict[str, int]:
        if not self._archivers:
            return {}
        state = self._table.state()
        try:
            episodes = self._archivers[0].count_episodes()
        except Unreachable as error:
            self._notes.append(f"the archive could not be counted: {error}")
            return {}
        return {
            "episodes": episodes,
            "not_archived": state.completions - state.archived,
        }

    def _summarise(self) -> RunSummary:
        self._enter("done")
        judges, published = self._judges(), self._telemetry.published()
        newest, final = max(published), self._final_suites()
        outcomes = {v: judges.outcomes(v, self._suite()) for v in published if v != newest}
        outcomes[newest] = judges.outcomes(newest, final[0])
        language = {}
        if len(final) > 1:
            scene = set(self._config.env.language_tasks)
            language["right"] = [o for o in outcomes[newest] or () if o.task in scene]
            language |= {suite.mode: judges.outcomes(newest, suite) or [] for suite in final[1:]}
        archive, status = self._archive_counts(), self.status()
        return RunSummary(
            run_dir=self._place.run_dir,
            preset=self._config.preset,
            outcomes={version: found for version, found in outcomes.items() if found},
            updates_by_version=published,
            language=language,
            steps_collected=self._telemetry.steps_collected,
            updates=status.updates,
            served_calls=status.served_calls,
            served_calls_failed=status.served_calls_failed,
            call_p50_ms=status.call_p50_ms,
            call_p99_ms=status.call_p99_ms,
            phase_seconds=self._phase_seconds,
            peak_memory_mb=self._memory.peak_bytes / 2**20,
            notes=list(status.notes),
            fleet=self._telemetry.fleet(),
            archive=archive,
        )
