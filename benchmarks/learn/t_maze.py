"""T-maze: what is seen once and needed a thousand steps later.

Bakker 2001, section 5. Experts walk corridors of 5 to 30 cells; the learners see windows of 16 steps. Judged on
corridors of up to 1,000. A Decision Transformer knows the last 16 steps; the memory-augmented model what it wrote
down. The ablation is the same trained model with its memory emptied before every step.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from learn_parts.figures import draw_lines
from learn_parts.results import Counts, answer, count, measure, target
from learn_parts.seeds import for_comparison, run_seeds, trained_for

from learn.settings import Settings
from vla_dist.core.protocols import Policy
from vla_dist.core.types import Array, Observation
from vla_dist.evaluation.suite import SuiteConfig
from vla_dist.run.config import ModelSettings, RunConfig
from vla_dist.run.presets import preset
from vla_dist.run.study import Study, Trained, open_study
from vla_dist.run.study_parts import Parts, Say

_CONTEXT, _LEARNING_RATE = 16, 1e-3
_LABELS = ("memory", "DT", "memory emptied")


class Forgetful:
    """A policy that begins every step as if it were the first."""

    def __init__(self, policy: Policy[Any]) -> None:
        self._policy = policy
        self.spec = policy.spec
        self.horizon = policy.horizon
        self.context_steps = policy.context_steps

    def initial_state(self, *, timestep: int = 0) -> Any:
        return self._policy.initial_state(timestep=timestep)

    def act(
        self,
        observations: Sequence[Observation],
        states: Sequence[Any],
        *,
        generator: np.random.Generator | None = None,
    ) -> tuple[list[Array], list[Any]]:
        chunks, _ = self._policy.act(observations, states, generator=generator)
        return chunks, [self._policy.initial_state() for _ in states]


def run(settings: Settings) -> dict[str, Any]:
    lengths = (10, 40) if settings.quick else (10, 30, 100, 1_000)
    protocol = {
        "environment": "t-maze, trained on corridors of 5 to 30 cells, windows of 16 steps",
        "episodes": 60 if settings.quick else 400,
        "updates": 40 if settings.quick else 600,
        "batch": 64,
        "learning_rate": _LEARNING_RATE,
        "memory": "24 slots of 32",
        "dt": "2 layers, width 64, K 16, no returns",
        "lengths": list(lengths),
        "evaluation_episodes": 20 if settings.quick else 40,
    }

    def run_seed(seed: int, folder: Path, parts: Parts, say: Say) -> dict[str, Any]:
        config = _config(seed, protocol["episodes"])
        with open_study(config, folder, parts, say) as study:
            study.collect()
            memory = study.train("memory", trained_for(config, protocol["updates"]))
            dt = study.train("dt", _decision_transformer(config, protocol["updates"]))
            return {"lengths": _judge(study, memory, dt, lengths, protocol["evaluation_episodes"])}

    seeds = run_seeds(settings, "t-maze", protocol, _config(0, protocol["episodes"]), run_seed)
    measures = {
        f"{label}, {length}": measure({seed: one["lengths"][str(length)][label] for seed, one in seeds.items()})
        for label in _LABELS
        for length in lengths
    }
    longest = lengths[-1]
    targets = [
        target(f"memory at {longest}", measures[f"memory, {longest}"]["mean"], 0.99),
        target(f"DT at {longest}, lower end (chance is 0.5)", measures[f"DT, {longest}"]["low"], 0.5, at_most=True),
        target(
            f"emptied memory at {longest}, lower end (chance is 0.5)",
            measures[f"memory emptied, {longest}"]["low"],
            0.5,
            at_most=True,
        ),
    ]
    return answer(
        settings,
        name="t-maze",
        title="T-maze",
        question="A sign is seen at the first step; at the end of a corridor of N cells it tells which way to turn. "
        "Without knowing it, half of the turns are right.",
        protocol=protocol,
        seeds=seeds,
        measures=measures,
        targets=targets,
        notes=[
            "`memory emptied` is the trained memory model with an empty memory at every step. The sign comes from an "
            "episode's seed alone: who always turns the same way is right in the same episodes at every length."
        ],
    )


def figure(result: dict[str, Any], path: Path) -> None:
    lines: dict[str, list[tuple[float, Any]]] = {}
    for label, found in result["measures"].items():
        name, _, length = label.partition(", ")
        lines.setdefault(name, []).append((float(length), found))
    draw_lines(
        path, lines, title="T-maze, trained on corridors of 5 to 30", across="cells of the corridor", is_log=True
    )


def _config(seed: int, episodes: int) -> RunConfig:
    config = for_comparison(preset("t-maze"), seed=seed)
    rollout = dataclasses.replace(config.rollout, episodes_per_task=episodes, num_workers=2)
    learner = dataclasses.replace(config.learner, learning_rate=_LEARNING_RATE)
    replay = dataclasses.replace(config.replay, min_steps=50)
    return dataclasses.replace(config, rollout=rollout, replay=replay, learner=learner)


def _decision_transformer(config: RunConfig, updates: int) -> RunConfig:
    """With past actions; there is no return to tell of."""
    changes = (f"context_steps={_CONTEXT}", "goal_dim=0", "use_returns=false", "hidden_dim=64", "n_layers=2")
    model = ModelSettings(preset="small", changes=changes, conditioning="none")
    return trained_for(dataclasses.replace(config, model=model), updates)


def _judge(
    study: Study, memory: Trained, dt: Trained, lengths: Sequence[int], episodes: int
) -> dict[str, dict[str, Counts]]:
    """Length -> label -> successes and trials."""
    config = study.place.config
    tasks = tuple(f"length-{length}" for length in lengths)
    there = dataclasses.replace(
        config,
        env=dataclasses.replace(config.env, tasks=tasks, max_episode_steps=2 * max(lengths) + 10),
        evaluation=dataclasses.replace(config.evaluation, num_envs=episodes),
    )
    suite = SuiteConfig(tasks=tasks, episodes_per_task=episodes, seed=config.evaluation.seed)
    (remembered,) = study.judge(memory, suite, config=there)
    (recent,) = study.judge(dt, suite, config=there)
    emptied = study.evaluate(Forgetful(study.load(memory)), suite, config=there)
    found = dict(zip(_LABELS, (remembered, recent, emptied), strict=True))
    return {
        str(length): {label: count([o for o in outcomes if o.task == task]) for label, outcomes in found.items()}
        for length, task in zip(lengths, tasks, strict=True)
    }
