"""Meta-World's ten tasks and three tasks of one scene, from state, told in words; 50 demonstrations each.

No published table has this form, so the expert on the same episodes is the measure. Meta-World's tasks have a scene
each, which gives the task away: what is claimed of language rests on the drawer-and-button scene, where success with
the right words stands beside success without words and with another task's words, and on wordings that training never
had.
"""

import dataclasses
from pathlib import Path
from typing import Any

from learn_parts.figures import draw_bars
from learn_parts.results import answer, count, difference, measure, paired, target
from learn_parts.seeds import for_comparison, run_seeds, suite_of, trained_for
from learn_parts.words import ROWS, judge_words, mt10, scene

from learn.settings import Settings
from vla_dist.run.config import ModelSettings, RunConfig
from vla_dist.run.presets import MT10_TASKS, SHARED_SCENE_TASKS, preset
from vla_dist.run.study import judge_expert, open_study
from vla_dist.run.study_parts import Parts, Say

_DT = ModelSettings(preset="mini")


def run(settings: Settings) -> dict[str, Any]:
    quick = settings.quick
    protocol = {
        "tasks": [*(MT10_TASKS[3:5] if quick else MT10_TASKS), *SHARED_SCENE_TASKS],
        "layouts": "split, goal in proprio",
        "episodes_per_task": 3 if quick else 50,
        "noise": [0.0, 0.2, 0.4, 0.6],
        "updates": 30 if quick else 6_000,
        "batch": 64,
        "one_token": "2 layers, width 64, K 5, no returns, no past actions, clean expert actions as targets",
        "dt": "2 layers, width 64, K 5, returns are steps to success, half of the past actions hidden in training",
        "words": "a random training wording of the task for each window",
        "max_episode_steps": 60 if quick else 200,
        "evaluation_episodes_per_task": 1 if quick else 10,
    }

    def run_seed(seed: int, folder: Path, parts: Parts, say: Say) -> dict[str, Any]:
        config = _config(seed, protocol)
        found: dict[str, Any] = {}
        with open_study(config, folder, parts, say) as study:
            study.collect()
            say("the expert")
            episodes = protocol["evaluation_episodes_per_task"]
            suite = suite_of(config, episodes)
            expert = judge_expert(config, suite)
            found["expert"] = {"mt10/training": count(mt10(expert)), "scene/training": count(scene(expert))}
            one_token = study.train("one-token", trained_for(config, protocol["updates"]))
            dt = study.train("dt", trained_for(dataclasses.replace(config, model=_DT), protocol["updates"]))
            found["one token"], first = judge_words(study, one_token, suite)
            found["DT"], second = judge_words(study, dt, suite)
            found["difference"] = difference(second, first)
            found["by_task"] = {
                task: {
                    label: count([o for o in outcomes if o.task == task])
                    for label, outcomes in (("expert", expert), ("one token", first), ("DT", second))
                }
                for task in config.env.tasks
            }
        return found

    seeds = run_seeds(settings, "metaworld-mt10", protocol, _config(0, protocol), run_seed)
    measures = {
        f"{label}: {row}": measure({seed: one[label][key] for seed, one in seeds.items()})
        for row, key in ROWS.items()
        for label in ("expert", "one token", "DT")
        if all(key in one[label] for one in seeds.values())
    }
    for task in protocol["tasks"]:
        for label in ("expert", "one token", "DT"):
            measures[f"{label}: {task}"] = measure({s: one["by_task"][task][label] for s, one in seeds.items()})
    measures["one token less DT, training words"] = paired({s: one["difference"] for s, one in seeds.items()})
    expert = measures["expert: MT10, training words"]["mean"] or 1.0
    targets = [
        found
        for label in ("one token", "DT")
        for found in (
            target(f"{label}: MT10 with training words, share of the expert", _mean(measures, label, 0) / expert, 0.95),
            target(f"{label}: MT10 with held-out words, share of the expert", _mean(measures, label, 1) / expert, 0.85),
            target(f"{label}: scene with wrong words", _mean(measures, label, 6), 0.10, at_most=True),
        )
    ]
    return answer(
        settings,
        name="metaworld-mt10",
        title="Meta-World MT10 and the shared scene, from state, in words",
        question="One policy for thirteen tasks that are told in words: how much of the expert's success, with words "
        "that it never heard, and does it do what it is told where only the words tell?",
        protocol=protocol,
        seeds=seeds,
        measures=measures,
        targets=targets,
        notes=[
            "The scene's tasks begin in equal states. `no words` and `wrong words` must fall there and need not in "
            "MT10, where each task has a scene of its own.",
            "The figures were first asked of the one-token policy alone; the Decision Transformer's stand beside them "
            "since its first seed was seen.",
        ],
    )


def figure(result: dict[str, Any], path: Path) -> None:
    groups: dict[str, dict[str, Any]] = {}
    for label, found in result["measures"].items():
        bar, separator, row = label.partition(": ")
        if separator and row in list(ROWS)[:7]:
            groups.setdefault(row.replace(", ", "\n").replace(" ", "\n"), {})[bar] = found
    draw_bars(path, groups, title="MT10 and the shared scene, from state, in words")


def _config(seed: int, protocol: dict[str, Any]) -> RunConfig:
    config = for_comparison(preset("metaworld-mt10"), seed=seed)
    env = dataclasses.replace(
        config.env, tasks=tuple(protocol["tasks"]), max_episode_steps=protocol["max_episode_steps"]
    )
    rollout = dataclasses.replace(
        config.rollout, episodes_per_task=protocol["episodes_per_task"], noise_scales=tuple(protocol["noise"])
    )
    replay = dataclasses.replace(config.replay, min_steps=50)
    return dataclasses.replace(config, env=env, rollout=rollout, replay=replay)


def _mean(measures: dict[str, Any], label: str, row: int) -> float:
    return measures[f"{label}: {list(ROWS)[row]}"]["mean"]
