"""A flat policy and a hierarchy of equal size on the same demonstrations, and the hierarchy under other planners.

An oracle in the planner's place knows which part of the task is due; chance does not. Which skill ran when is stored
nowhere; the hierarchy finds the change itself (Shiarlis et al. 2018).
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from learn.settings import Settings
from learn_parts.figures import draw_bars
from learn_parts.results import answer, count, difference, measure, paired, target
from learn_parts.seeds import run_seeds, suite_of, trained_for

from vla_dist.core.specs import EnvSpec
from vla_dist.evaluation.suite import EpisodeOutcome, Evaluator, SuiteConfig
from vla_dist.run.composition.learning import build_model_config
from vla_dist.run.composition.place import build_env, build_spec
from vla_dist.run.config import ModelSettings, RunConfig
from vla_dist.run.phrases import phrase_source
from vla_dist.run.study import Study, Trained, open_study
from vla_dist.run.study_parts import Parts, Say

_LABELS = ("flat", "hierarchy", "hierarchy, oracle subgoals", "hierarchy, random subgoals")
_DIFFERENCE = "hierarchy less flat"
MODELS = {
    "hierarchy": "planner and controller of the last 16 steps, width 64 with a hidden layer of 128, K 16, asked every "
    "5 steps and where a skill is found done; told a wrong skill before in half of the steps that are told one",
    "flat": "one token a step, 2 layers, K 16, the width that comes nearest to the hierarchy's parameters",
}
"""For the protocol."""


def compare_levels(
    config: RunConfig,
    skills: Sequence[str],
    judged: Sequence[str],
    protocol: Mapping[str, Any],
    folder: Path,
    parts: Parts,
    say: Say,
) -> dict[str, Any]:
    """Successes and trials of each label, pairs and parameters; plain JSON.

    Args:
        config: of one seed, without its model.
        skills: that the planner chooses among.
        judged: tasks of the suite; the others are only demonstrated.
        protocol: with ``updates`` and ``evaluation_episodes_per_task``.
    """
    suite = dataclasses.replace(suite_of(config, protocol["evaluation_episodes_per_task"]), tasks=tuple(judged))
    high, low = _models(config, skills)
    with open_study(config, folder, parts, say) as study:
        study.collect()
        updates = protocol["updates"]
        hierarchy = study.train("hierarchy", trained_for(dataclasses.replace(config, model=high), updates))
        flat = study.train("flat", trained_for(dataclasses.replace(config, model=low), updates))
        found: dict[str, list[EpisodeOutcome]] = dict(
            zip(_LABELS, [*study.judge(flat, suite), *study.judge(hierarchy, suite)], strict=False)
        )
        for label, subgoals in ((_LABELS[2], "oracle"), (_LABELS[3], "random")):
            say(label)
            found[label] = _judge_ablation(study, hierarchy, suite, subgoals)
    answered: dict[str, Any] = {label: count(outcomes) for label, outcomes in found.items()}
    answered["pairs"] = difference(found["flat"], found["hierarchy"])
    answered["parameters"] = {name: _size(config, model) for name, model in (("hierarchy", high), ("flat", low))}
    return answered


def run_levels(
    settings: Settings,
    *,
    name: str,
    title: str,
    question: str,
    protocol: Mapping[str, Any],
    skills: Sequence[str],
    judged: Sequence[str],
    config: Callable[[int], RunConfig],
) -> dict[str, Any]:
    """What ``compare_levels`` finds with each seed, as a benchmark answers.

    Args:
        judged: tasks of the suite, of those that are demonstrated.
        config: seed to everything but the model.
    """

    def run_seed(seed: int, folder: Path, parts: Parts, say: Say) -> dict[str, Any]:
        return compare_levels(config(seed), skills, judged, protocol, folder, parts, say)

    seeds = run_seeds(settings, name, protocol, config(0), run_seed)
    measures = {label: measure({seed: one[label] for seed, one in seeds.items()}) for label in _LABELS}
    measures[_DIFFERENCE] = paired({seed: one["pairs"] for seed, one in seeds.items()})
    means = {label: measures[label]["mean"] for label in _LABELS}
    targets = [
        target("lower end of hierarchy less flat", measures[_DIFFERENCE]["low"], 0.0),
        target("oracle less learned subgoals", means[_LABELS[2]] - means["hierarchy"], 0.0),
        target("learned less random subgoals", means["hierarchy"] - means[_LABELS[3]], 0.0),
    ]
    sizes = next(iter(seeds.values()))["parameters"]
    return answer(
        settings,
        name=name,
        title=title,
        question=question,
        protocol=protocol,
        seeds=seeds,
        measures=measures,
        targets=targets,
        notes=[f"Parameters: {sizes['hierarchy']:,} of the hierarchy, {sizes['flat']:,} of the flat policy."],
    )


def draw_levels(result: dict[str, Any], path: Path, *, what: str, title: str) -> None:
    bars = {label: found for label, found in result["measures"].items() if label != _DIFFERENCE}
    draw_bars(path, {what: bars}, title=title)


def _models(config: RunConfig, skills: Sequence[str]) -> tuple[ModelSettings, ModelSettings]:
    """The hierarchy, and the flat policy whose size is nearest."""
    high = ModelSettings(
        architecture="hierarchical",
        preset="tiny",
        changes=(
            f"skills={json.dumps(list(skills))}",
            "learned_termination=true",
            "context_steps=16",
            "controller_context_steps=16",
            "planner_context_steps=16",
            "hold_steps=5",
            "hidden_dim=128",
        ),
        conditioning="none",
    )
    wanted = _size(config, high)
    flat = [
        ModelSettings(preset="tiny", hidden_dim=width, context_steps=16, conditioning="none")
        for width in range(32, 164, 4)
    ]
    return high, min(flat, key=lambda model: abs(_size(config, model) - wanted))


def _size(config: RunConfig, model: ModelSettings) -> int:
    """Parameters."""
    from vla_dist.models.member import as_module
    from vla_dist.models.zoo import architecture

    made = build_model_config(dataclasses.replace(config, model=model), _spec(config))
    return sum(p.numel() for p in as_module(architecture(model.architecture).model(made)).parameters())


_specs: dict[str, EnvSpec] = {}


def _spec(config: RunConfig) -> EnvSpec:
    """Of the environment, whose simulator may take half a second to build."""
    key = repr(config.env)
    if key not in _specs:
        _specs[key] = build_spec(config)
    return _specs[key]


def _judge_ablation(study: Study, hierarchy: Trained, suite: SuiteConfig, subgoals: str) -> list[EpisodeOutcome]:
    """The trained controller under another planner, one episode at a time: an oracle looks into its environment."""
    from vla_dist.models.auto import build_model
    from vla_dist.models.hierarchical.hierarchical_vla import HierarchicalVLA
    from vla_dist.models.hierarchical.policy import HierarchicalPolicy

    config = study.place.config
    artifact = study.artifact(hierarchy)
    model, conditioning, goals = build_model(artifact)
    assert isinstance(model, HierarchicalVLA)
    env = build_env(config)
    simulated: Any = getattr(env, "inner", env)
    policy = HierarchicalPolicy(
        model,
        artifact.manifest.spec,
        conditioning=conditioning,
        goals=goals,
        subgoals="oracle" if subgoals == "oracle" else "random",
        oracle=(lambda observation: simulated.skill) if subgoals == "oracle" else None,
    )
    with contextlib.closing(Evaluator([env], phrase_source(config, "training"))) as evaluator:
        return evaluator.evaluate(policy, suite)
