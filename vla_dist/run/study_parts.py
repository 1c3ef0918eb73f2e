"""Who does the work of a study: everything in this process, or hosts as a run has them."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict
from functools import partial
from typing import Any, Protocol

import ray

from vla_dist.core.errors import ReplayWait, Unreachable, WaitTimeout
from vla_dist.core.types import Metrics
from vla_dist.envs.instructions import Split
from vla_dist.evaluation.suite import EpisodeOutcome, SuiteConfig
from vla_dist.run.board import BoardEntry, BoardLink
from vla_dist.run.composition.learning import build_learner
from vla_dist.run.composition.place import Place
from vla_dist.run.composition.rollouts import build_judge, build_rollout_worker
from vla_dist.run.composition.stores import lift_ratio
from vla_dist.run.evaluations import EvaluationBoard
from vla_dist.run.files import write_atomically
from vla_dist.run.host import JudgeHost, WorkerHost
from vla_dist.run.hosts import HostedWorker
from vla_dist.run.placement import Placement
from vla_dist.run.roles import ROLLOUT
from vla_dist.run.serve_app import free_ports
from vla_dist.run.serving_start import ServingStart, Start, serve_place
from vla_dist.run.training import Training

_TICK_S = 0.5
_STOP_S = 60.0
_PATIENCE_S = 180.0
"""With a store that does not answer."""
_MAX_COLLECT_S, _MAX_TRAIN_S, _MAX_JUDGE_S = 4 * 3600.0, 24 * 3600.0, 4 * 3600.0

Say = Callable[[str], None]
"""Takes a line on how far it is; each replaces the one before."""


class Parts(Protocol):
    """Who does the work of a study; each call ends when its work is done."""

    def collect(self, place: Place, say: Say) -> None:
        """Every episode that the config asks of its rollout workers; those that are stored already are skipped."""
        ...

    def train(self, place: Place, say: Say) -> None:
        """From the first update to the last, publishing as the config says."""
        ...

    def interact(self, place: Place, say: Say) -> None:
        """Collects and trains at once, the learner's versions acting beside the teacher, until the learner is done."""
        ...

    def attempt(self, place: Place, say: Say) -> None:
        """Every episode that the config asks of the policy itself, which is there already."""
        ...

    def judge(
        self, place: Place, version: int, suites: Sequence[SuiteConfig], instructions: Split
    ) -> list[list[EpisodeOutcome]]:
        """Outcomes of each suite; what was judged before is not judged again."""
        ...


class LocalParts:
    """Everything in this process."""

    def collect(self, place: Place, say: Say) -> None:
        for index in range(place.config.rollout.num_workers):
            name, end = f"rollout-{index}", time.monotonic() + _MAX_COLLECT_S
            board: Any = _Told(say, wanted=_episodes_wanted(place))
            with contextlib.ExitStack() as opened:
                host = WorkerHost(name, partial(build_rollout_worker, place, index, opened=opened), board)
                host.run(max_seconds=_MAX_COLLECT_S, closes=True)
            _require_time(end, name)

    def train(self, place: Place, say: Say) -> None:
        self._train(place, say, may_wait=lambda: False, lifts=False)

    def interact(self, place: Place, say: Say) -> None:
        count = place.config.rollout.num_workers
        board: Any = _Told(lambda line: None, wanted=_episodes_wanted(place))
        with contextlib.ExitStack() as opened, ThreadPoolExecutor(count) as threads:
            build = partial(build_rollout_worker, place, opened=opened)
            hosts = [WorkerHost(f"rollout-{i}", partial(build, i), board) for i in range(count)]
            runs = [threads.submit(host.run, max_seconds=_MAX_COLLECT_S, closes=True) for host in hosts]
            try:
                # The replay may be short of what the learner asks for, as long as somebody collects.
                self._train(place, say, may_wait=lambda: not all(run.done() for run in runs), lifts=True)
            finally:
                for host in hosts:
                    host.stop()
                wait(runs, timeout=_STOP_S)
        for run in runs:
            run.result()

    def attempt(self, place: Place, say: Say) -> None:
        self.collect(place, say)

    @staticmethod
    def _train(place: Place, say: Say, *, may_wait: Callable[[], bool], lifts: bool) -> None:
        """Args:
            may_wait: whether more data will come.
            lifts: where none will, the learner goes on with what there is, whatever the ratio says.

        Raises:
            ReplayWait: the replay is short of data, and none will come.
            Unreachable: the store stays away.
        """
        from vla_dist.learner.config import Rank

        end, trouble_since, is_lifted = time.monotonic() + _MAX_TRAIN_S, None, False
        with contextlib.ExitStack() as opened:
            learner = build_learner(place, Rank(), opened=opened)
            opened.callback(learner.close)
            while not learner.done:
                _require_time(end, "the learner")
                try:
                    _say_progress(say, learner.step(), place)
                    trouble_since = None
                except ReplayWait:
                    if may_wait():
                        continue
                    if is_lifted or not lifts:
                        raise
                    lift_ratio(place)  # nobody inserts any more
                    is_lifted = True
                except Unreachable:
                    # Nothing done is lost, and on a busy machine a server may be late.
                    trouble_since = trouble_since or time.monotonic()
                    if time.monotonic() - trouble_since > _PATIENCE_S:
                        raise
                    time.sleep(_TICK_S)

    def judge(
        self, place: Place, version: int, suites: Sequence[SuiteConfig], instructions: Split
    ) -> list[list[EpisodeOutcome]]:
        path = place.run_dir / f"outcomes-{place.config.preset}-{instructions}.json"
        known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        keys = [f"v{version}/{place.config.env.max_episode_steps}/{suite}" for suite in suites]
        if missing := {key: suite for key, suite in zip(keys, suites, strict=True) if key not in known}:
            with contextlib.closing(build_judge(place, instructions=instructions)) as judge:
                for key, suite in missing.items():
                    known[key] = [asdict(outcome) for outcome in judge.judge(version, suite)]
                    write_atomically(path, json.dumps(known))
        return [[EpisodeOutcome(**row) for row in known[key]] for key in keys]


class HostedParts:
    """As a run places them, on a Ray that is initialised."""

    def __init__(self, name: str) -> None:
        self._placement = Placement()
        self._board = BoardLink(name)
        self._board.start(self._placement.beside_driver(cpus=0))

    def collect(self, place: Place, say: Say) -> None:
        self._collect(place, say)

    def _collect(self, place: Place, say: Say, *, served_at: str = "") -> None:
        with self._rollouts(place, served_at=served_at) as hosts:
            end = time.monotonic() + _MAX_COLLECT_S
            while not all(host.is_done for host in hosts):
                _require_time(end, "the rollout workers")
                for host in hosts:
                    host.poll()
                seen = self._board.read()
                done = sum(m.get("finished", 0.0) for n, m in seen.items() if n.startswith(f"{place.run_id}/"))
                say(f"{done:.0f} of {_episodes_wanted(place)} episodes")
                time.sleep(_TICK_S)

    def train(self, place: Place, say: Say) -> None:
        self._train(place, say, ())

    def interact(self, place: Place, say: Say) -> None:
        # The teacher's episodes come first, before there is a version: workers are told where it will be served.
        address, start = self._service(place)
        with (
            self._rollouts(place, served_at=address) as hosts,
            contextlib.closing(ServingStart(start)) as serving,
        ):
            self._train(place, say, hosts, serving)

    def attempt(self, place: Place, say: Say) -> None:
        address, start = self._service(place)
        with contextlib.closing(start(lambda: False)):
            self._collect(place, say, served_at=address)

    def _service(self, place: Place) -> tuple[str, Start]:
        """Where the policy service will be, and what starts it."""
        (port,) = free_ports(1)
        explores = place.config.rollout.policy_explores
        return f"127.0.0.1:{port}", partial(serve_place, place, self._placement, port=port, explores=explores)

    def _train(
        self, place: Place, say: Say, hosts: Sequence[HostedWorker], serving: ServingStart | None = None
    ) -> None:
        """Watching those who collect meanwhile, and what they ask."""
        training, is_lifted = Training(place, self._placement, BoardEntry(self._board, "learner")), False
        with contextlib.closing(training):
            end = time.monotonic() + _MAX_TRAIN_S
            while not training.is_done:
                _require_time(end, "the learner")
                for host in hosts:
                    host.poll()
                if hosts and not is_lifted and all(host.is_done for host in hosts):
                    lift_ratio(place)  # nobody inserts any more: a learner that is short would wait for ever
                    is_lifted = True
                if serving is not None and serving.is_done:
                    serving.result()  # raises what its start raised
                _say_progress(say, self._board.read().get("learner", {}), place)
                time.sleep(_TICK_S)
            training.raise_if_failed()

    def judge(
        self, place: Place, version: int, suites: Sequence[SuiteConfig], instructions: Split
    ) -> list[list[EpisodeOutcome]]:
        make: Any = ray.remote(JudgeHost).options(max_restarts=-1, **self._rollout_options(place))
        judges: list[Any] = [make.remote(place, instructions) for _ in range(place.config.evaluation.num_workers)]
        try:
            board = EvaluationBoard(judges, place.run_dir / f"evaluations-{place.config.preset}-{instructions}.json")
            for suite in suites:
                board.ask(version, suite)
            end = time.monotonic() + _MAX_JUDGE_S
            while not board.is_idle:
                _require_time(end, "the judges")
                board.poll()
                time.sleep(_TICK_S / 5)
            return [board.outcomes(version, suite) or [] for suite in suites]
        finally:
            for judge in judges:
                ray.kill(judge)

    @contextlib.contextmanager
    def _rollouts(self, place: Place, *, served_at: str = "") -> Iterator[list[HostedWorker]]:
        hosts = [
            HostedWorker(
                f"{place.run_id}/rollout-{index}",  # the board still shows what earlier ones came to
                partial(build_rollout_worker, place, index, served_at=served_at),
                self._board,
                max_seconds=_MAX_COLLECT_S,
                options=self._rollout_options(place),
            )
            for index in range(place.config.rollout.num_workers)
        ]
        try:
            yield hosts
        finally:
            for host in hosts:
                host.close()

    def _rollout_options(self, place: Place) -> dict[str, Any]:
        return self._placement.options(ROLLOUT, cpus=place.config.placement.rollout_cpus)


class _Told:
    """Takes what a host would post on a run's board."""

    def __init__(self, say: Say, *, wanted: int) -> None:
        self._say = say
        self._wanted = wanted

    def post(self, component: str, metrics: Metrics) -> None:
        self._say(f"{component}: {metrics.get('finished', 0.0):.0f} episodes of {self._wanted} in all")


def _episodes_wanted(place: Place) -> int:
    return place.config.rollout.total_episodes_per_task * len(place.config.env.tasks)


def _say_progress(say: Say, metrics: Metrics, place: Place) -> None:
    done, loss = metrics.get("updates", 0.0), metrics.get("loss", float("nan"))
    say(f"update {done:.0f} of {place.config.learner.total_updates}, loss {loss:.4f}")


def _require_time(end: float, who: str) -> None:
    if time.monotonic() > end:
        raise WaitTimeout(f"{who} did not end within hours; call again to go on, or ask for less")
