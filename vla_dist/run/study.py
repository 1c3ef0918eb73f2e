"""One data set, several learners, one judgement: what comparisons of learners are made of.

A run trains while it collects, so no two runs learn from the same episodes. A study collects first and then trains each
learner on exactly those, or on a part of them, and judges all on the same seeds, which no training episode can have.

Its parts (``study_parts.py``) are a run's, built by ``composition``: ``HostedParts`` places them as a run does, rollout
workers and judges as Ray actors and the learner under Ray Train; ``LocalParts`` steps them in this process.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vla_dist.core.errors import ConfigError, NotFound
from vla_dist.core.protocols import Policy
from vla_dist.core.types import PolicyArtifact, Segment
from vla_dist.envs.instructions import Split
from vla_dist.evaluation.suite import EpisodeOutcome, Evaluator, SuiteConfig
from vla_dist.run.composition.learning import build_policy_loader
from vla_dist.run.composition.place import Place, build_env
from vla_dist.run.composition.rollouts import policy_episodes
from vla_dist.run.composition.stores import build_registry, build_table, lift_ratio
from vla_dist.run.config import RunConfig
from vla_dist.run.files import write_atomically
from vla_dist.run.phrases import phrase_source
from vla_dist.run.store import open_store
from vla_dist.run.study_parts import Parts, Say

_ATTEMPTS = "attempts.json"
_SOURCE_SEED = 5000
_ATTEMPTS_AT_ONCE = 8
"""In each rollout worker."""
_SEGMENTS_PER_APPEND = 256
_APPEND_TIMEOUT_S = 60.0


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
        lift_ratio(self.place)
        self._parts.collect(self.place, self._say)
        return self.place

    def demonstrate(self, name: str, seeds: Sequence[int], data: Place) -> None:
        """The teacher's episodes of these seeds, one each for every task, into a data set that was derived.

        Args:
            name: of these episodes, unique within the study; calling again under it goes on or finds them there.
        """
        rollout = replace(data.config.rollout, seeds=tuple(seeds), episodes_per_task=len(seeds))
        place = replace(data, config=replace(data.config, rollout=rollout), run_id=f"{self.place.run_id}-{name}")
        self._parts.collect(place, self._say)

    def attempt(self, name: str, trained: Trained, seeds: Sequence[int]) -> dict[int, bool]:
        """Whether a version succeeds at what these seeds lay out, in every task; of training seeds, so that what it
        fails at may be demonstrated.

        It acts as it does for robots: rollout workers ask the policy service, and what they did lies in the replay.

        Args:
            name: of these attempts, unique within the study; calling again under it goes on or finds them there.
        """
        path = self.place.run_dir / _ATTEMPTS
        known: dict[str, list[tuple[int, bool]]] = json.loads(path.read_text()) if path.exists() else {}
        if name not in known:
            known[name] = list(self._attempt(name, trained, seeds).items())
            # Their episodes make way for later ones.
            write_atomically(path, json.dumps(known))
        return dict(known[name])

    def _attempt(self, name: str, trained: Trained, seeds: Sequence[int]) -> dict[int, bool]:
        config = trained.place.config
        rollout = replace(
            config.rollout,
            teacher="none",
            seeds=tuple(seeds),
            episodes_per_task=len(seeds),
            policy_episodes_per_task=len(seeds),
            policy_streams=_ATTEMPTS_AT_ONCE,
            policy_explores=False,
        )
        # One table for all calls of one size, with room for two of them: older attempts make way.
        room = 2 * (len(seeds) * len(config.env.tasks) + 2) * config.env.max_episode_steps
        config = replace(
            config,
            preset=f"{self.place.config.preset}-attempts-{len(seeds)}",
            rollout=rollout,
            replay=replace(config.replay, capacity_steps=room, min_steps=1, strata=()),
            serving=replace(config.serving, policy=f"{config.preset}@{trained.version}"),
        )
        place = replace(trained.place, config=config, run_id=f"{self.place.run_id}-{name}")
        lift_ratio(place)
        self._parts.attempt(place, lambda line: self._say(f"{name}: {line}"))
        asked = policy_episodes(place)
        seed_of = {episode: seed for index in range(asked.num_workers) for episode, _, seed in asked.episodes(index)}
        found: dict[int, bool] = {}
        for episode in self.episodes(place):
            if (seed := seed_of.get(episode[0].episode_id)) is not None:
                found[seed] = found.get(seed, True) and bool(episode[-1].success)
        if len(found) < len(set(seeds)):
            raise NotFound(f"of {len(set(seeds))} attempts {name!r} only {len(found)} are in the replay; call again")
        return {seed: found[seed] for seed in seeds}

    def derive(self, name: str, episodes: Iterable[list[Segment]], *, strata: tuple[str, ...] | None = None) -> Place:
        """A data set of its own, under another name in the same store; what it holds already is not stored twice.

        Args:
            strata: how its batches are put together (``ReplaySettings.strata``); None: as the study's are.
        """
        replay = self.place.config.replay if strata is None else replace(self.place.config.replay, strata=strata)
        config = replace(self.place.config, preset=f"{self.place.config.preset}-{name}", replay=replay)
        place = replace(self.place, config=config)
        lift_ratio(place)
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
            config: with its model and learner; its tasks must be those of ``data``, whose replay is read.
            data: None: what ``collect`` collected.

        Raises:
            ConfigError: the config has other tasks.
            WorkerFailed: it failed more often than allowed.
        """
        data = data or self.place
        if config.env.tasks != data.config.env.tasks:
            raise ConfigError(
                f"learner {name!r} asks for tasks {config.env.tasks}, its data set has {data.config.env.tasks}"
            )
        config = replace(config, preset=data.config.preset, replay=data.config.replay)
        place = replace(data, config=config, run_id=f"{self.place.run_id}-{name}")
        return self._finish(name, place, self._parts.train)

    def interact(self, name: str, config: RunConfig) -> Trained:
        """A learner on a data set of its own that grows meanwhile, by the teacher and by its own versions.

        The ratio of sampling to inserting is the config's. Raises WorkerFailed where a part failed too often.
        """
        config = replace(config, preset=f"{self.place.config.preset}-{name}")
        place = replace(self.place, config=config, run_id=f"{self.place.run_id}-{name}")
        return self._finish(name, place, self._parts.interact)

    def _finish(self, name: str, place: Place, work: Callable[[Place, Say], None]) -> Trained:
        """Its last version, once it is there, whoever has published it."""
        started = time.monotonic()
        if _published(place) is None:
            work(place, lambda line: self._say(f"{name}: {line}"))
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

    def artifact(self, trained: Trained) -> PolicyArtifact:
        """As it lies in the registry."""
        with contextlib.closing(build_registry(trained.place)) as registry:
            return registry.fetch(trained.place.config.preset, trained.version)

    def load(self, trained: Trained) -> Policy[Any]:
        """The trained policy, in this process."""
        return build_policy_loader(trained.place.config)(self.artifact(trained))

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


def _published(place: Place) -> int | None:
    """The learner's last version, once it is there."""
    mine = {"run_id": place.run_id, "updates": place.config.learner.total_updates}
    with contextlib.closing(build_registry(place)) as registry:
        for manifest in registry.manifests(place.config.preset):
            if manifest.config.get("provenance") == mine:
                return manifest.version
    return None
