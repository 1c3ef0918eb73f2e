"""BabyAI: four ways to bring words and sight together, on the same demonstrations with the same budget.

One model (the composed VLA) with concatenation, cross-attention, a gate, or FiLM. The control is trained with each
episode's words exchanged for another's: what it still reaches, the words were not needed for.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from learn_parts.figures import draw_bars
from learn_parts.results import answer, count, measure, target
from learn_parts.seeds import for_comparison, run_seeds, suite_of, trained_for

from learn.settings import Settings
from vla_dist.core.types import Segment
from vla_dist.run.config import ModelSettings, RunConfig
from vla_dist.run.presets import preset
from vla_dist.run.study import open_study
from vla_dist.run.study_parts import Parts, Say

_FUSIONS = ("concat", "cross_attention", "gated_fusion", "film")
_CONTROL = "words shuffled"


def run(settings: Settings) -> dict[str, Any]:
    tasks = ("GoToLocal",) if settings.quick else ("GoToLocal", "PickupLoc")
    protocol = {
        "tasks": list(tasks),
        "layouts": "split",
        "demonstrations": 40 if settings.quick else 1_000,
        "updates": 20 if settings.quick else 3_000,
        "batch": 64,
        "learning_rate": 1e-3,
        "model": "composed VLA of symbols and words, width 256, one frame, MiniLM sentence vectors",
        "control": f"film, {_CONTROL}",
        "evaluation_episodes": 16 if settings.quick else 200,
    }

    def run_seed(seed: int, folder: Path, parts: Parts, say: Say) -> dict[str, Any]:
        return {"tasks": {task: _compare(_config(seed, task, protocol), folder / task, parts, say) for task in tasks}}

    def _compare(config: RunConfig, folder: Path, parts: Parts, say: Say) -> dict[str, Any]:
        suite = suite_of(config, protocol["evaluation_episodes"])
        found = {}
        with open_study(config, folder, parts, say) as study:
            study.collect()
            shuffled = study.derive("shuffled", with_shuffled_words(study.episodes(), seed=config.seed))
            for label, fusion, data in (
                *((fusion, fusion, None) for fusion in _FUSIONS),
                (_CONTROL, "film", shuffled),
            ):
                learner = trained_for(_with_fusion(config, fusion), protocol["updates"])
                trained = study.train(label.replace(" ", "-").replace("_", "-"), learner, data)
                (outcomes,) = study.judge(trained, suite)
                found[label] = count(outcomes)
        return found

    seeds = run_seeds(settings, "babyai-fusion", protocol, _config(0, tasks[0], protocol), run_seed)
    measures = {
        f"{label}, {task}": measure({seed: one["tasks"][task][label] for seed, one in seeds.items()})
        for task in tasks
        for label in (*_FUSIONS, _CONTROL)
    }
    targets = [
        target(
            f"worst fusion less the control on {task}",
            min(measures[f"{fusion}, {task}"]["low"] for fusion in _FUSIONS) - measures[f"{_CONTROL}, {task}"]["high"],
            0.0,
        )
        for task in tasks
    ]
    return answer(
        settings,
        name="babyai-fusion",
        title="BabyAI: fusions of words and sight",
        question="Which way of bringing words and sight together learns most from the same demonstrations, and how "
        "much is done without the words?",
        protocol=protocol,
        seeds=seeds,
        measures=measures,
        targets=targets,
        notes=[
            "The target compares ends of intervals: the lower one of the worst fusion, the upper one of the control."
        ],
    )


def figure(result: dict[str, Any], path: Path) -> None:
    groups: dict[str, dict[str, Any]] = {}
    for label, found in result["measures"].items():
        bar, _, task = label.partition(", ")
        groups.setdefault(task, {})[bar] = found
    draw_bars(path, groups, title="BabyAI: fusions of words and sight")


def with_shuffled_words(episodes: Iterable[list[Segment]], *, seed: int) -> Iterator[list[Segment]]:
    """Each episode with the words of another one, drawn without putting back."""
    everything = sorted(episodes, key=lambda episode: episode[0].episode_id)
    words = [episode[0].instruction for episode in everything]
    order = np.random.default_rng((2, seed)).permutation(len(words))
    for episode, other in zip(everything, order, strict=True):
        yield [dataclasses.replace(segment, instruction=words[other]) for segment in episode]


def _config(seed: int, task: str, protocol: dict[str, Any]) -> RunConfig:
    config = for_comparison(preset("babyai"), seed=seed)
    rollout = dataclasses.replace(
        config.rollout,
        num_workers=2,
        episodes_per_task=protocol["demonstrations"],
        noise_scales=(0.0,),
        policy_episodes_per_task=0,
    )
    return dataclasses.replace(
        config,
        env=dataclasses.replace(config.env, tasks=(task,), layouts="split"),
        rollout=rollout,
        replay=dataclasses.replace(config.replay, min_steps=50),
        learner=dataclasses.replace(
            config.learner, batch_size=protocol["batch"], learning_rate=protocol["learning_rate"]
        ),
        evaluation=dataclasses.replace(config.evaluation, num_envs=32),
    )


def _with_fusion(config: RunConfig, fusion: str) -> RunConfig:
    changes = (f"fusion_type={fusion}", "horizon=1", "hidden_dim=256")
    model = ModelSettings(architecture="vla", preset="tiny", changes=changes, conditioning="none")
    return dataclasses.replace(config, model=model)
