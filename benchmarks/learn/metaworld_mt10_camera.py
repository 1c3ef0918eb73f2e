"""``metaworld-mt10`` from a camera: proprio tells where the hand is, and only the image where anything else is.

The composed VLA looks at one frame of 64 pixels and does four actions at a time. One model, so that two cores end it.
"""

import dataclasses
from pathlib import Path
from typing import Any

from learn_parts.figures import draw_bars
from learn_parts.results import answer, count, measure, target
from learn_parts.seeds import for_comparison, run_seeds, suite_of, trained_for
from learn_parts.words import ROWS, judge_words, mt10, scene

from learn.settings import Settings
from vla_dist.core.specs import CameraSpec
from vla_dist.run.config import ModelSettings, RunConfig
from vla_dist.run.presets import MT10_TASKS, SHARED_SCENE_TASKS, preset
from vla_dist.run.study import judge_expert, open_study
from vla_dist.run.study_parts import Parts, Say

_PIXELS = 64


def run(settings: Settings) -> dict[str, Any]:
    quick = settings.quick
    protocol = {
        "tasks": [*(MT10_TASKS[4:5] if quick else MT10_TASKS), *SHARED_SCENE_TASKS],
        "layouts": "split, objects and goal only in the image",
        "camera": f"table, {_PIXELS} x {_PIXELS}",
        "episodes_per_task": 2 if quick else 50,
        "noise": [0.0, 0.2, 0.4],
        "updates": 8 if quick else 4_000,
        "batch": 16 if quick else 64,
        "learning_rate": 1e-3,
        "model": "composed VLA, four convolutions, FiLM, width 128, one frame, chunks of 4",
        "max_episode_steps": 30 if quick else 200,
        "evaluation_episodes_per_task": 1 if quick else 5,
    }

    def run_seed(seed: int, folder: Path, parts: Parts, say: Say) -> dict[str, Any]:
        config = _config(seed, protocol)
        suite = suite_of(config, protocol["evaluation_episodes_per_task"])
        with open_study(config, folder, parts, say) as study:
            study.collect()
            say("the expert")
            expert = judge_expert(config, suite)
            trained = study.train("vla", trained_for(config, protocol["updates"]))
            found, said = judge_words(study, trained, suite)
        return {
            "expert": {"mt10/training": count(mt10(expert)), "scene/training": count(scene(expert))},
            "VLA": found,
            "by_task": {task: count([o for o in said if o.task == task]) for task in config.env.tasks},
        }

    seeds = run_seeds(settings, "metaworld-mt10-camera", protocol, _config(0, protocol), run_seed)
    measures = {
        f"{label}: {row}": measure({seed: one[label][key] for seed, one in seeds.items()})
        for row, key in ROWS.items()
        for label in ("expert", "VLA")
        if all(key in one[label] for one in seeds.values())
    }
    measures |= {
        f"VLA: {task}": measure({seed: one["by_task"][task] for seed, one in seeds.items()})
        for task in protocol["tasks"]
    }
    expert = measures["expert: MT10, training words"]["mean"] or 1.0
    return answer(
        settings,
        name="metaworld-mt10-camera",
        title="Meta-World MT10 and the shared scene, from a camera, in words",
        question="What is left of `metaworld-mt10` where the policy has to see what it used to be told?",
        protocol=protocol,
        seeds=seeds,
        measures=measures,
        targets=[
            target(
                "scene, training words less no words",
                measures["VLA: scene, training words"]["mean"] - measures["VLA: scene, no words"]["mean"],
                0.0,
            ),
            target("scene with wrong words", measures["VLA: scene, wrong words"]["mean"], 0.10, at_most=True),
        ],
        notes=[
            f"MT10 with training words is {measures['VLA: MT10, training words']['mean'] / expert:.0%} of the expert's "
            "success. No figure was asked of the camera but that of wrong words."
        ],
    )


def figure(result: dict[str, Any], path: Path) -> None:
    groups: dict[str, dict[str, Any]] = {}
    for label, found in result["measures"].items():
        bar, _, row = label.partition(": ")
        if row in list(ROWS)[:7]:
            groups.setdefault(row.replace(", ", "\n").replace(" ", "\n"), {})[bar] = found
    draw_bars(path, groups, title="MT10 and the shared scene, from a camera, in words")


def _config(seed: int, protocol: dict[str, Any]) -> RunConfig:
    config = for_comparison(preset("metaworld-mt10"), seed=seed)
    return dataclasses.replace(
        config,
        preset="metaworld-mt10-camera",
        env=dataclasses.replace(
            config.env,
            tasks=tuple(protocol["tasks"]),
            max_episode_steps=protocol["max_episode_steps"],
            cameras=(CameraSpec(name="table", height=_PIXELS, width=_PIXELS),),
            shows_goal=False,
            shows_objects=False,
        ),
        rollout=dataclasses.replace(
            config.rollout, episodes_per_task=protocol["episodes_per_task"], noise_scales=tuple(protocol["noise"])
        ),
        replay=dataclasses.replace(config.replay, min_steps=50, image_encodings=("lz4",)),
        model=ModelSettings(
            architecture="vla",
            preset="tiny",
            changes=("fusion_type=film", "hidden_dim=128", "horizon=4"),
            conditioning="none",
        ),
        learner=dataclasses.replace(
            config.learner, batch_size=protocol["batch"], learning_rate=protocol["learning_rate"]
        ),
    )
