"""A flat policy and a hierarchy of equal size on the same demonstrations, and the hierarchy under other planners.

An oracle in the planner's place knows which part of the task is due; chance does not. Which skill ran when is stored
nowhere; the hierarchy finds the change itself (Shiarlis et al. 2018). Groups of tasks are answered apart.
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

_SENTENCE_DIM = 384
_FLAT, _HIERARCHY, _LOOKING = "flat", "hierarchy", "hierarchy, planner that looks"
_ABLATIONS = {"hierarchy, oracle subgoals": "oracle", "hierarchy, random subgoals": "random"}
_DIFFERENCE = "hierarchy less flat"
_CONTROLLER = "controller of the last {} steps, width 64 with a hidden layer of 128, K 16"
_LOOKS = (
    "planner of the last 16 steps, of the controller's widths, asked every 5 steps and where a skill is found done; "
    "told any skill of the episode as the one before in half of the steps that are told one"
)
MODELS = {
    "hierarchy": f"{_LOOKS}; {_CONTROLLER.format(16)}",
    "flat": "one token a step, 2 layers, K 16, the width that comes nearest to the hierarchy's parameters",
}
READING_MODELS = {
    "hierarchy": f"planner that reads the order of skills clause by clause and goes on where one is found done; "
    f"{_CONTROLLER.format(4)}",
    "planner that looks": f"{_LOOKS}; the same controller",
    "flat": "one token a step, 2 layers, K 16, the width that comes nearest to the larger hierarchy's parameters",
    "words": "MiniLM, each clause by itself, for all alike",
}
"""For the protocol; with a planner that reads a sketch, the one that looks is another line."""


def compare_levels(
    config: RunConfig,
    skills: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    protocol: Mapping[str, Any],
    folder: Path,
    parts: Parts,
    say: Say,
    *,
    reads: bool = False,
) -> dict[str, Any]:
    """Successes and trials of each label and group, pairs and parameters; plain JSON.

    Args:
        config: of one seed, without its model; its tasks are demonstrated.
        skills: that the planner chooses among.
        groups: name -> tasks of the suite.
        protocol: with ``updates`` and ``evaluation_episodes_per_task``.
        reads: the hierarchy reads a sketch, and one that looks is compared as well.
    """
    judged = tuple(task for tasks in groups.values() for task in tasks)
    shows_all = dataclasses.replace(config, env=dataclasses.replace(config.env, tasks=judged))
    suite = suite_of(shows_all, protocol["evaluation_episodes_per_task"])
    models = _models(config, skills, reads=reads)
    found: dict[str, list[EpisodeOutcome]] = {}
    with open_study(config, folder, parts, say) as study:
        study.collect()
        trained = {
            label: study.train(name, trained_for(dataclasses.replace(config, model=model), protocol["updates"]))
            for (label, model), name in zip(models.items(), ("flat", "hierarchy", "looking"), strict=False)
        }
        for label, one in trained.items():
            (found[label],) = study.judge(one, suite, config=shows_all)
        for label, subgoals in _ABLATIONS.items():
            say(label)
            found[label] = _judge_ablation(study, trained[_HIERARCHY], suite, shows_all, subgoals)
    answered: dict[str, Any] = {"groups": {}}
    for group, tasks in groups.items():
        these = {label: [one for one in outcomes if one.task in tasks] for label, outcomes in found.items()}
        answered["groups"][group] = {label: count(outcomes) for label, outcomes in these.items()}
        answered["groups"][group]["pairs"] = difference(these[_FLAT], these[_HIERARCHY])
    answered["parameters"] = {label: _size(config, model) for label, model in models.items()}
    return answered


def run_levels(
    settings: Settings,
    *,
    name: str,
    title: str,
    question: str,
    protocol: Mapping[str, Any],
    skills: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    config: Callable[[int], RunConfig],
    reads: bool = False,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """What ``compare_levels`` finds with each seed, as a benchmark answers.

    Args:
        groups: name -> tasks of the suite; a name of "" goes without saying.
        config: seed to everything but the model.
    """

    def run_seed(seed: int, folder: Path, parts: Parts, say: Say) -> dict[str, Any]:
        return compare_levels(config(seed), skills, groups, protocol, folder, parts, say, reads=reads)

    seeds = run_seeds(settings, name, protocol, config(0), run_seed)
    measures: dict[str, dict[str, Any]] = {}
    targets: list[dict[str, Any]] = []
    for group in groups:
        of_seeds = {seed: one["groups"][group] for seed, one in seeds.items()}
        labels = [label for label in next(iter(of_seeds.values())) if label != "pairs"]
        here = {label: measure({seed: one[label] for seed, one in of_seeds.items()}) for label in labels}
        here[_DIFFERENCE] = paired({seed: one["pairs"] for seed, one in of_seeds.items()})
        tail = f": {group}" if group else ""
        measures |= {f"{label}{tail}": value for label, value in here.items()}
        means = {label: value["mean"] for label, value in here.items()}
        oracle, chance = (means[label] for label in _ABLATIONS)
        targets += [
            target(f"lower end of hierarchy less flat{tail}", here[_DIFFERENCE]["low"], 0.0),
            target(f"oracle less learned subgoals{tail}", oracle - means[_HIERARCHY], 0.0),
            target(f"learned less random subgoals{tail}", means[_HIERARCHY] - chance, 0.0),
        ]
    sizes = next(iter(seeds.values()))["parameters"]
    told = ", ".join(f"{label} {size:,}" for label, size in sizes.items())
    return answer(
        settings,
        name=name,
        title=title,
        question=question,
        protocol=protocol,
        seeds=seeds,
        measures=measures,
        targets=targets,
        notes=[*notes, f"Parameters: {told}."],
    )


def draw_levels(result: dict[str, Any], path: Path, *, what: str, title: str) -> None:
    """Args:
    what: the group that goes without saying.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, found in result["measures"].items():
        label, _, group = name.partition(": ")
        if label != _DIFFERENCE:
            groups.setdefault(group or what, {})[label] = found
    draw_bars(path, groups, title=title)


def _models(config: RunConfig, skills: Sequence[str], *, reads: bool) -> dict[str, ModelSettings]:
    """Label -> model; the flat policy is the one whose size is nearest to the largest hierarchy's."""
    clauses = ("goal_clauses=2", f"goal_dim={2 * _SENTENCE_DIM}") if reads else ()
    both = (
        f"skills={json.dumps(list(skills))}",
        "learned_termination=true",
        "context_steps=16",
        # What was done before a skill began is none of its business, where any may have come before.
        f"controller_context_steps={4 if reads else 16}",
        "hidden_dim=128",
        *clauses,
    )
    looks = ("planner_context_steps=16", "hold_steps=5")
    changes = {_HIERARCHY: (*both, "planner=sketch") if reads else (*both, *looks)}
    if reads:
        changes[_LOOKING] = (*both, *looks)
    models = {
        label: ModelSettings(architecture="hierarchical", preset="tiny", changes=those, conditioning="none")
        for label, those in changes.items()
    }
    wanted = max(_size(config, model) for model in models.values())
    flat = [
        ModelSettings(preset="tiny", hidden_dim=width, context_steps=16, changes=clauses, conditioning="none")
        for width in range(32, 164, 4)
    ]
    return {_FLAT: min(flat, key=lambda model: abs(_size(config, model) - wanted)), **models}


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


def _judge_ablation(
    study: Study, hierarchy: Trained, suite: SuiteConfig, config: RunConfig, subgoals: str
) -> list[EpisodeOutcome]:
    """The trained controller under another planner, one episode at a time: an oracle looks into its environment."""
    from vla_dist.models.auto import build_model
    from vla_dist.models.hierarchical.hierarchical_vla import HierarchicalVLA
    from vla_dist.models.hierarchical.policy import HierarchicalPolicy

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
