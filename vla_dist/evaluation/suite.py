"""Success of a policy on seeds that no training episode can have."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vla_dist.core.errors import ConfigError
from vla_dist.core.protocols import Policy, PolicyLoader, PolicyRegistry, RobotEnv
from vla_dist.core.seeding import evaluation_seed
from vla_dist.core.types import Array, Observation, Step
from vla_dist.evaluation.statistics import SuccessRate, success_rate

InstructionMode = Literal["right", "zeroed", "wrong"]
"""right: the words of the task. zeroed: no words. wrong: the words of another task of the same scene."""

PhraseSource = Callable[[str, int], str | None]
"""(task, seed) -> instruction; None lets the environment word its own mission."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteConfig:
    """Which episodes a policy is judged on. Equal suites give paired episodes to every version."""

    tasks: tuple[str, ...]
    episodes_per_task: int = 10
    seed: int = 0
    mode: InstructionMode = "right"

    def __post_init__(self) -> None:
        if not self.tasks or self.episodes_per_task < 1:
            raise ConfigError("a suite needs at least one task and one episode per task")
        if self.mode == "wrong" and len(self.tasks) < 2:
            raise ConfigError(f"wrong instructions need two tasks of one scene; got only {self.tasks}")

    def episodes(self) -> Iterator[tuple[str, int, str]]:
        """(task, seed, task whose words are said)."""
        for index in range(self.episodes_per_task):
            for position, task in enumerate(self.tasks):
                # Cycles through every other task, so that each wrong pairing occurs.
                told = self.tasks[(position + 1 + index % max(1, len(self.tasks) - 1)) % len(self.tasks)]
                yield task, evaluation_seed(self.seed, index), told if self.mode == "wrong" else task


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeOutcome:
    """One evaluation episode."""

    task: str
    """Judged by this task's success condition."""
    told: str
    """Task whose words were said; empty where none were."""
    seed: int
    success: bool
    obeyed: bool
    """Whether the told task was done at any time."""
    num_steps: int


class Evaluator:
    """Runs suites with one environment per slot in lockstep, so that the policy acts on a batch."""

    def __init__(self, envs: Sequence[RobotEnv], phrases: PhraseSource) -> None:
        if not envs:
            raise ConfigError("an evaluator needs at least one environment; got none")
        self._envs = list(envs)
        self._phrases = phrases

    def evaluate(self, policy: Policy[Any], suite: SuiteConfig) -> list[EpisodeOutcome]:
        """Every episode of the suite once, in the order in which they end."""
        waiting = suite.episodes()
        slots = [_Slot(env) for env in self._envs]
        outcomes: list[EpisodeOutcome] = []
        while True:
            for slot in slots:
                if slot.is_free and (episode := next(waiting, None)) is not None:
                    slot.start(policy, suite.mode, *episode, phrases=self._phrases)
            running = [slot for slot in slots if not slot.is_free]
            if not running:
                return outcomes
            self._act(policy, [slot for slot in running if not slot.queue])
            for slot in running:
                if (outcome := slot.advance()) is not None:
                    outcomes.append(outcome)

    def film(self, policy: Policy[Any], suite: SuiteConfig, *, every: int) -> list[tuple[str, list[Array]]]:
        """(caption, (H, W, 3) uint8 frames) of the suite's first episode of each task.

        Raises:
            ResourceMissing: this machine cannot draw.
        """
        scenes: list[tuple[str, list[Array]]] = []
        for task, seed, told in itertools.islice(suite.episodes(), len(suite.tasks)):
            slot = _Slot(self._envs[0])
            slot.start(policy, suite.mode, task, seed, told, phrases=self._phrases)
            frames = [slot.env.render()]
            outcome = None
            while outcome is None:
                if not slot.queue:
                    self._act(policy, [slot])
                outcome = slot.advance()
                if outcome is not None or slot.num_steps % every == 0:
                    frames.append(slot.env.render())
            words = slot.step.observation.instruction
            scenes.append((f"{words} - {'done' if outcome.success else 'failed'}", frames))
        return scenes

    def close(self) -> None:
        for env in self._envs:
            env.close()

    @staticmethod
    def _act(policy: Policy[Any], slots: list["_Slot"]) -> None:
        if not slots:
            return
        chunks, states = policy.act([slot.step.observation for slot in slots], [slot.state for slot in slots])
        for slot, chunk, state in zip(slots, chunks, states, strict=True):
            slot.queue, slot.state = list(chunk), state


class _Slot:
    """One environment and the episode it is running."""

    def __init__(self, env: RobotEnv) -> None:
        self.env = env
        self.queue: list[Array] = []
        self.state: Any = None
        self.step = Step(observation=Observation(proprio=np.zeros(0, np.float32)))
        self.is_free = True

    def start(
        self, policy: Policy[Any], mode: InstructionMode, task: str, seed: int, told: str, *, phrases: PhraseSource
    ) -> None:
        self.task, self.seed, self.told = task, seed, "" if mode == "zeroed" else told
        self.step = self.env.reset(seed=seed, task=task, instruction=phrases(told, seed) if self.told else "")
        self.state, self.queue = policy.initial_state(), []
        self.num_steps, self.obeyed, self.is_free = 0, False, False

    def advance(self) -> EpisodeOutcome | None:
        """Execute one action; the outcome when the episode is over."""
        self.step = self.env.step(np.asarray(self.queue.pop(0)))
        self.num_steps += 1
        self.obeyed |= self.told in self.step.info.get("achieved", ()) or (self.told == self.task and self.step.success)
        if not self.step.is_last:
            return None
        self.is_free = True
        return EpisodeOutcome(
            task=self.task,
            told=self.told,
            seed=self.seed,
            success=self.step.success,
            obeyed=self.obeyed,
            num_steps=self.num_steps,
        )


def overall(outcomes: Sequence[EpisodeOutcome]) -> SuccessRate:
    """All episodes pooled."""
    return success_rate(sum(o.success for o in outcomes), len(outcomes))


def by_task(outcomes: Sequence[EpisodeOutcome]) -> dict[str, SuccessRate]:
    tasks = list(dict.fromkeys(o.task for o in outcomes))
    return {task: overall([o for o in outcomes if o.task == task]) for task in tasks}


class VersionJudge:
    """Fetches versions from the registry and judges them: the unit that a run places on a machine."""

    def __init__(self, registry: PolicyRegistry, load: PolicyLoader, evaluator: Evaluator, name: str) -> None:
        self._registry = registry
        self._load = load
        self._evaluator = evaluator
        self._name = name

    def judge(self, version: int, suite: SuiteConfig) -> list[EpisodeOutcome]:
        return self._evaluator.evaluate(self._load(self._registry.fetch(self._name, version)), suite)

    def film(self, version: int, suite: SuiteConfig, *, every: int) -> list[tuple[str, list[Array]]]:
        """(caption, frames) of the suite's first episode of each task, every ``every``-th step."""
        return self._evaluator.film(self._load(self._registry.fetch(self._name, version)), suite, every=every)

    def close(self) -> None:
        self._evaluator.close()
