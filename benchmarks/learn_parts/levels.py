"""A flat policy and a hierarchy of equal size on the same demonstrations, and the hierarchy under other planners.

An oracle in the planner's place knows which part of the task is due; chance does not. Which skill ran when is stored
nowhere; the hierarchy finds the change itself (Shiarlis et al. 2018). Groups of tasks are answered apart.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LevelModels:
    """What the models of a comparison have in common, and how large they are."""

    clauses: int
    """Of the longest sentence; the hierarchy reads the order of skills from them."""
    width: int = 64
    """Of the controller, before its hidden layer."""
    hidden: int = 128
    subgoal: int = 16
    """Width of a skill's vector."""
    fusion: Literal["add", "film"] = "add"
    """How what is wanted meets what is seen, in the controller and in the flat policy alike."""
    alignment: Literal["window", "episode"] = "window"
    """How the hierarchy finds which skill ran when."""
    looks: bool = False
    """Whether a hierarchy whose planner looks, and reads no order, is compared as well."""

    def protocol(self) -> dict[str, str]:
        """For the protocol of a benchmark."""
        film = ""
        if self.fusion == "film":
            film = ", no narrower than the controller; what is seen is scaled and shifted by what is wanted, in both"
        aligned = "; windows are aligned as parts of their episodes" if self.alignment == "episode" else ""
        controller = f"controller of the last 4 steps, width {self.width} with a hidden layer of {self.hidden}, K 16"
        told = {
            "hierarchy": "planner that reads the order of skills clause by clause and goes on where one is found done; "
            f"{controller}{aligned}"
        }
        if self.looks:
            told["planner that looks"] = (
                "planner of the last 16 steps, of the controller's widths, asked every 5 steps and where a skill is "
                "found done; told any skill of the episode as the one before in half of the steps that are told one; "
                "the same controller"
            )
        larger = "the larger hierarchy's" if self.looks else "the hierarchy's"
        told["flat"] = f"one token a step, 2 layers, K 16, the width that comes nearest to {larger} parameters{film}"
        return {**told, "words": "MiniLM, each clause by itself, for all alike"}


def compare_levels(
    config: RunConfig,
    skills: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    protocol: Mapping[str, Any],
    folder: Path,
    parts: Parts,
    say: Say,
    *,
    sizes: LevelModels,
) -> dict[str, Any]:
    """Successes and trials of each label and group, pairs and parameters; plain JSON.

    Args:
        config: of one seed, without its model; its tasks are demonstrated.
        skills: that the planner chooses among.
        groups: name -> tasks of the suite.
        protocol: with ``updates`` and ``evaluation_episodes_per_task``.
    """
    judged = tuple(task for tasks in groups.values() for task in tasks)
    shows_all = dataclasses.replace(config, env=dataclasses.replace(config.env, tasks=judged))
    suite = suite_of(shows_all, protocol["evaluation_episodes_per_task"])
    models = _models(config, skills, sizes)
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
    sizes: LevelModels,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """What ``compare_levels`` finds with each seed, as a benchmark answers.

    Args:
        groups: name -> tasks of the suite; a name of "" goes without saying.
        config: seed to everything but the model.
    """

    def run_seed(seed: int, folder: Path, parts: Parts, say: Say) -> dict[str, Any]:
        return compare_levels(config(seed), skills, groups, protocol, folder, parts, say, sizes=sizes)

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
    numbers = next(iter(seeds.values()))["parameters"]
    told = ", ".join(f"{label} {number:,}" for label, number in numbers.items())
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


def _models(config: RunConfig, skills: Sequence[str], sizes: LevelModels) -> dict[str, ModelSettings]:
    """Label -> model; the flat policy is the one whose size is nearest to the largest hierarchy's. One that reads words
    by FiLM is no narrower than the controller and has more: long vectors of words take much of it.
    """
    clauses = (f"goal_clauses={sizes.clauses}", f"goal_dim={sizes.clauses * _SENTENCE_DIM}")
    both = (
        f"skills={json.dumps(list(skills))}",
        "learned_termination=true",
        "context_steps=16",
        # What was done before a skill began is none of its business, where any may have come before.
        "controller_context_steps=4",
        f"low_level_dim={sizes.width}",
        f"hidden_dim={sizes.hidden}",
        f"subgoal_dim={sizes.subgoal}",
        f"alignment={sizes.alignment}",
        f"subgoal_fusion={'film' if sizes.fusion == 'film' else 'concat'}",
        *clauses,
    )
    changes = {_HIERARCHY: (*both, "planner=sketch")}
    if sizes.looks:
        changes[_LOOKING] = (*both, "planner_context_steps=16", "hold_steps=5")
    models = {
        label: ModelSettings(architecture="hierarchical", preset="tiny", changes=those, conditioning="none")
        for label, those in changes.items()
    }
    wanted = max(_size(config, model) for model in models.values())
    flat = [
        ModelSettings(
            preset="tiny",
            hidden_dim=width,
            context_steps=16,
            changes=(*clauses, f"goal_fusion={sizes.fusion}"),
            conditioning="none",
        )
        for width in range(sizes.width if sizes.fusion == "film" else 32, 164, 4)
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
