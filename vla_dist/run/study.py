"""One data set, several learners, one judgement: what comparisons of learners are made of.

A run trains while it collects, so no two runs learn from the same episodes. A study collects first and then trains each
learner on exactly those, or on a part of them, and judges all on the same seeds, which no training episode can have.

Its parts are a run's, built by ``build.py``. ``HostedParts`` places them as a run does: rollout workers and judges as
Ray actors, the learner under Ray Train. ``LocalParts`` steps them one after the other in this process.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vla_dist.core.errors import ConfigError, NotFound, WaitTimeout
from vla_dist.core.protocols import Policy
from vla_dist.core.types import Metrics, Segment
from vla_dist.envs.instructions import Split
from vla_dist.evaluation.suite import EpisodeOutcome, Evaluator, SuiteConfig
from vla_dist.replay.limiter import LimiterConfig
from vla_dist.run.build import (
    Place,
    build_env,
    build_judge,
    build_learner,
    build_policy_loader,
    build_registry,
    build_rollout_worker,
    build_table,
    phrase_source,
)
from vla_dist.run.config import RunConfig
from vla_dist.run.store import open_store

_SOURCE_SEED = 5000
_SEGMENTS_PER_APPEND = 256
_TICK_S = 0.5
_APPEND_TIMEOUT_S = 60.0
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

    def judge(
        self, place: Place, version: int, suites: Sequence[SuiteConfig], instructions: Split
    ) -> list[list[EpisodeOutcome]]:
        """Outcomes of each suite."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a learner came to."""

    place: Place
    version: int
    seconds: float


class Study:
    """A folder, a store that answers, and the parts that work on it."""

    def __init__(self, place: Place, parts: Parts, say: Say) -> None:
        self.place = place
        self._parts = parts
        self._say = say

    def collect(self) -> Place:
        """The data set. Calling again after an interruption goes on where it stopped."""
        _free_limiter(self.place)
        self._parts.collect(self.place, self._say)
        return self.place

    def derive(self, name: str, episodes: Iterable[list[Segment]]) -> Place:
        """A data set of its own, under another name in the same store; what it holds already is not stored twice."""
        config = replace(self.place.config, preset=f"{self.place.config.preset}-{name}")
        place = replace(self.place, config=config)
        _free_limiter(place)
        with contextlib.closing(build_table(place)) as table:
            waiting: list[Segment] = []
            for episode in episodes:
                waiting += episode
                if len(waiting) >= _SEGMENTS_PER_APPEND:
                    table.append_all(waiting, timeout_s=_APPEND_TIMEOUT_S)
                    waiting = []
            if waiting:
                table.append_all(waiting, timeout_s=_APPEND_TIMEOUT_S)
        return place

    def episodes(self, place: Place | None = None) -> Iterator[list[Segment]]:
        """All complete episodes of a data set, each as its segments."""
        with contextlib.closing(build_table(place or self.place, seed=_SOURCE_SEED)) as table:
            yield from table.episodes()

    def train(self, name: str, config: RunConfig, data: Place | None = None) -> Trained:
        """A learner on a data set.

        Args:
            name: of the learner, unique within the study; training again under it goes on or finds it done.
            config: with its model and learner; what decides the data must be that of ``data``.
            data: None: what ``collect`` collected.

        Raises:
            ConfigError: the config would read another data set.
            WorkerFailed: it failed more often than allowed.
        """
        data = data or self.place
        config = replace(config, preset=data.config.preset)
        if (config.env.tasks, config.replay) != (data.config.env.tasks, data.config.replay):
            raise ConfigError(f"learner {name!r} asks for other tasks or another replay than its data set has")
        place = replace(data, config=config, run_id=f"{self.place.run_id}-{name}")
        started = time.monotonic()
        if _published(place) is None:
            self._parts.train(place, lambda line: self._say(f"{name}: {line}"))
        version = _published(place)
        if version is None:
            raise NotFound(f"learner {name!r} ended without its last version; look into {place.run_dir}")
        return Trained(place=place, version=version, seconds=time.monotonic() - started)

    def judge(
        self, trained: Trained, *suites: SuiteConfig, instructions: Split = "training", config: RunConfig | None = None
    ) -> list[list[EpisodeOutcome]]:
        """Outcomes of each suite.

        Args:
            config: whose environment to judge in, where it differs from the one that was trained in.
        """
        self._say("judging")
        place = trained.place
        if config is not None:
            place = replace(place, config=replace(place.config, env=config.env, evaluation=config.evaluation))
        return self._parts.judge(place, trained.version, suites, instructions)

    def load(self, trained: Trained) -> Policy[Any]:
        """The trained policy, in this process."""
        place = trained.place
        with contextlib.closing(build_registry(place)) as registry:
            return build_policy_loader(place.config)(registry.fetch(place.config.preset, trained.version))

    def evaluate(
        self, policy: Policy[Any], suite: SuiteConfig, *, config: RunConfig | None = None
    ) -> list[EpisodeOutcome]:
        """Outcomes of a policy that is not in the registry, such as a crippled one, in this process."""
        config = config or self.place.config
        evaluator = Evaluator(
            [build_env(config) for _ in range(config.evaluation.num_envs)], phrase_source(config, "training")
        )
        with contextlib.closing(evaluator):
            return evaluator.evaluate(policy, suite)


@contextlib.contextmanager
def open_study(config: RunConfig, folder: Path, parts: Parts, say: Say = lambda line: None) -> Iterator[Study]:
    """A study in a folder, new or interrupted. Raises what ``open_store`` raises."""
    folder.mkdir(parents=True, exist_ok=True)
    with open_store(config, folder.resolve()) as store:
        yield Study(Place.of(config, folder.resolve(), store), parts, say)


def best_episodes(episodes: Iterable[list[Segment]], share: float) -> list[list[Segment]]:
    """Those of the highest return, at most ``share`` of all; of equal returns all or none, but never nothing.

    Source: "percentile behaviour cloning" of Chen et al. 2021, "Decision Transformer", section 5.1.
    """
    everything = list(episodes)
    returns = np.array([sum(float(s.rewards[: s.length].sum()) for s in episode) for episode in everything])
    values, counts = np.unique(returns, return_counts=True)
    from_above = counts[::-1].cumsum()[::-1]
    fitting = values[from_above <= share * len(everything)]
    least = fitting[0] if len(fitting) else values[-1]
    return [episode for episode, value in zip(everything, returns, strict=True) if value >= least]


def judge_expert(config: RunConfig, suite: SuiteConfig) -> list[EpisodeOutcome]:
    """What the scripted teacher itself reaches on a suite."""
    from vla_dist.envs.make import make_expert

    env = build_env(config)
    expert, outcomes = make_expert(env), []
    with contextlib.closing(env):
        for task, seed, told in suite.episodes():
            step, count = env.reset(seed=seed, task=task), 0
            expert.reset(task=task, seed=seed)
            while not step.is_last:
                step, count = env.step(expert.act(step.observation)), count + 1
            outcomes.append(
                EpisodeOutcome(
                    task=task, told=told, seed=seed, success=step.success, obeyed=step.success, num_steps=count
                )
            )
    return outcomes


class LocalParts:
    """Everything in this process."""

    def collect(self, place: Place, say: Say) -> None:
        from vla_dist.run.host import WorkerHost

        for index in range(place.config.rollout.num_workers):
            name, end = f"rollout-{index}", time.monotonic() + _MAX_COLLECT_S
            board: Any = _Told(say, wanted=_episodes_wanted(place))
            with contextlib.closing(WorkerHost(name, partial(build_rollout_worker, place, index), board)) as host:
                host.run(max_seconds=_MAX_COLLECT_S)
            _require_time(end, name)

    def train(self, place: Place, say: Say) -> None:
        from vla_dist.learner.config import Rank

        learner = build_learner(place, Rank())
        with contextlib.closing(learner):
            while not learner.done:
                _say_progress(say, learner.step(), place)

    def judge(
        self, place: Place, version: int, suites: Sequence[SuiteConfig], instructions: Split
    ) -> list[list[EpisodeOutcome]]:
        judge = build_judge(place, instructions=instructions)
        with contextlib.closing(judge):
            return [judge.judge(version, suite) for suite in suites]


class HostedParts:
    """As a run places them, on a Ray that is initialised."""

    def __init__(self, name: str) -> None:
        from vla_dist.run.board import BoardLink
        from vla_dist.run.placement import Placement

        self._placement = Placement()
        self._board = BoardLink(name)
        self._board.start(self._placement.beside_driver(cpus=0))

    def collect(self, place: Place, say: Say) -> None:
        from vla_dist.run.hosts import HostedWorker

        hosts = [
            HostedWorker(
                f"rollout-{index}",
                partial(build_rollout_worker, place, index),
                self._board,
                max_seconds=_MAX_COLLECT_S,
                options=self._rollout_options(place),
            )
            for index in range(place.config.rollout.num_workers)
        ]
        try:
            end = time.monotonic() + _MAX_COLLECT_S
            while not all(host.is_done for host in hosts):
                _require_time(end, "the rollout workers")
                for host in hosts:
                    host.poll()
                seen = self._board.read()
                done = sum(m.get("finished", 0.0) for n, m in seen.items() if n.startswith("rollout-"))
                say(f"{done:.0f} of {_episodes_wanted(place)} episodes")
                time.sleep(_TICK_S)
        finally:
            for host in hosts:
                host.close()

    def train(self, place: Place, say: Say) -> None:
        from vla_dist.run.training import Training

        training = Training(place, self._placement, partial(self._board.post, "learner"))
        with contextlib.closing(training):
            end = time.monotonic() + _MAX_TRAIN_S
            while not training.is_done:
                _require_time(end, "the learner")
                _say_progress(say, self._board.read().get("learner", {}), place)
                time.sleep(_TICK_S)
            training.raise_if_failed()

    def judge(
        self, place: Place, version: int, suites: Sequence[SuiteConfig], instructions: Split
    ) -> list[list[EpisodeOutcome]]:
        import ray

        from vla_dist.run.evaluations import EvaluationBoard
        from vla_dist.run.host import JudgeHost

        make = ray.remote(JudgeHost).options(max_restarts=-1, **self._rollout_options(place))
        judges = [make.remote(place, instructions) for _ in range(place.config.evaluation.num_workers)]
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

    def _rollout_options(self, place: Place) -> dict[str, Any]:
        from vla_dist.run.roles import ROLLOUT

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


def _free_limiter(place: Place) -> None:
    """Nobody collects while somebody learns: neither side has to wait for the other."""
    with contextlib.closing(build_table(place, seed=_SOURCE_SEED)) as table:
        table.override_limiter(LimiterConfig(min_steps=1, samples_per_insert=None))


def _published(place: Place) -> int | None:
    """The learner's last version, once it is there."""
    mine = {"run_id": place.run_id, "updates": place.config.learner.total_updates}
    with contextlib.closing(build_registry(place)) as registry:
        for manifest in registry.manifests(place.config.preset):
            if manifest.config.get("provenance") == mine:
                return manifest.version
    return None
