"""Two tasks in a row, in one scene: does a planner of skills above a controller do what one policy cannot?

Six sequences of opening, closing and pressing; a pressed button springs back, so what was done may no longer be seen.
The flat policy and the hierarchy have as many parameters, the same demonstrations, updates and batch. The ablations put
another in the planner's place: an oracle that knows which task is due, and chance. Which skill ran when is stored
nowhere; the hierarchy finds the change itself (Shiarlis et al. 2018).
"""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from learn_parts.figures import draw_bars
from learn_parts.results import answer, count, difference, measure, paired, target
from learn_parts.seeds import for_comparison, run_seeds, suite_of, trained_for

from learn.settings import Settings
from vla_dist.core.specs import EnvSpec
from vla_dist.evaluation.suite import EpisodeOutcome, Evaluator, SuiteConfig
from vla_dist.run.composition.learning import build_model_config
from vla_dist.run.composition.place import build_env, build_spec
from vla_dist.run.config import ModelSettings, RunConfig
from vla_dist.run.phrases import phrase_source
from vla_dist.run.presets import SHARED_SCENE_TASKS, preset
from vla_dist.run.study import Study, Trained, open_study
from vla_dist.run.study_parts import Parts, Say

_SEQUENCES = tuple(f"{a}+{b}" for a in SHARED_SCENE_TASKS for b in SHARED_SCENE_TASKS if a != b)
_LABELS = ("flat", "hierarchy", "hierarchy, oracle subgoals", "hierarchy, random subgoals")
_DIFFERENCE = "hierarchy less flat"


def run(settings: Settings) -> dict[str, Any]:
    quick = settings.quick
    protocol = {
        "tasks": list(_SEQUENCES[:2] if quick else _SEQUENCES),
        "layouts": "split",
        "episodes_per_task": 3 if quick else 50,
        "noise": [0.0, 0.2],
        "updates": 12 if quick else 6_000,
        "batch": 64,
        "hierarchy": "planner and controller of width 64 with a hidden layer of 128, K 16, asked every 5 steps and "
        "where a skill is found done",
        "flat": "one token a step, 2 layers, K 16, the width that comes nearest to the hierarchy's parameters",
        "max_episode_steps": 60 if quick else 300,
        "evaluation_episodes_per_task": 1 if quick else 15,
    }

    updates = protocol["updates"]

    def run_seed(seed: int, folder: Path, parts: Parts, say: Say) -> dict[str, Any]:
        config = _config(seed, protocol)
        suite = suite_of(config, protocol["evaluation_episodes_per_task"])
        high, low = _models(config)
        with open_study(config, folder, parts, say) as study:
            study.collect()
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

    seeds = run_seeds(settings, "hierarchy", protocol, _config(0, protocol), run_seed)
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
        name="hierarchy",
        title="Hierarchy: two tasks in a row",
        question="At equal parameters and demonstrations, does a planner above a controller get further than one "
        "policy?",
        protocol=protocol,
        seeds=seeds,
        measures=measures,
        targets=targets,
        notes=[f"Parameters: {sizes['hierarchy']:,} of the hierarchy, {sizes['flat']:,} of the flat policy."],
    )


def figure(result: dict[str, Any], path: Path) -> None:
    bars = {label: found for label, found in result["measures"].items() if label != _DIFFERENCE}
    draw_bars(path, {"two tasks in a row": bars}, title="Drawer and button: flat and hierarchical")


def _config(seed: int, protocol: dict[str, Any]) -> RunConfig:
    config = for_comparison(preset("metaworld-mt10"), seed=seed)
    return dataclasses.replace(
        config,
        preset="hierarchy",
        env=dataclasses.replace(
            config.env,
            tasks=tuple(protocol["tasks"]),
            language_tasks=(),
            max_episode_steps=protocol["max_episode_steps"],
            shows_goal=False,
        ),
        rollout=dataclasses.replace(
            config.rollout, episodes_per_task=protocol["episodes_per_task"], noise_scales=tuple(protocol["noise"])
        ),
        replay=dataclasses.replace(config.replay, min_steps=50),
    )


def _models(config: RunConfig) -> tuple[ModelSettings, ModelSettings]:
    """The hierarchy, and the flat policy whose size is nearest."""
    skills = "[" + ", ".join(f'"{task}"' for task in SHARED_SCENE_TASKS) + "]"
    high = ModelSettings(
        architecture="hierarchical",
        preset="tiny",
        changes=(
            f"skills={skills}",
            "learned_termination=true",
            "context_steps=16",
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
    """Of the scene; its simulator takes half a second to build."""
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
