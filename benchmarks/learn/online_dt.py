"""Online Decision Transformer: what is gained by acting, over learning from the same demonstrations alone?

Zheng et al. 2022. Both sides have the same few noisy demonstrations, model, updates and batch. One learns from them
alone. The other does so for the first half of its updates; then its versions act, ask for the upper quantile of what
they reached lately, and half of each batch comes from what they did, told its own return in hindsight. Both are judged
on the same episodes. Through the whole system the versions act as they do for robots: the rollout workers ask Ray Serve
for each action.
"""

import dataclasses
from pathlib import Path
from typing import Any

from learn_parts.figures import draw_bars
from learn_parts.results import answer, count, difference, measure, paired, target
from learn_parts.seeds import for_comparison, run_seeds, suite_of

from learn.settings import Settings
from vla_dist.run.config import RunConfig
from vla_dist.run.presets import preset
from vla_dist.run.study import open_study
from vla_dist.run.study_parts import Parts, Say

_UPLIFT = "online less offline"


def run(settings: Settings) -> dict[str, Any]:
    quick = settings.quick
    protocol = {
        "tasks": ["drawer-open", "button-press-topdown"],
        "layouts": "split",
        "demonstrations_per_task": 4 if quick else 3,
        "noise": [0.2, 0.4, 0.8],
        "online_episodes_per_task": 3 if quick else 120,
        "updates": 12 if quick else 1_200,
        "offline_updates": 6 if quick else 600,
        "versions_that_act": 2 if quick else 8,
        "batch": "64, online half demonstrations, half own episodes",
        "samples_per_insert": 2.0,
        "model": "decision transformer, 2 layers, width 64, K 5, gaussian head; returns are steps to success",
        "max_episode_steps": 60 if quick else 200,
        "evaluation_episodes_per_task": 4 if quick else 50,
    }

    def run_seed(seed: int, folder: Path, parts: Parts, say: Say) -> dict[str, Any]:
        config = _config(seed, protocol)
        suite = suite_of(config, protocol["evaluation_episodes_per_task"])
        offline = _offline(config)
        with open_study(offline, folder, parts, say) as study:
            study.collect()
            (before,) = study.judge(study.train("offline", offline), suite)
            (after,) = study.judge(study.interact("online", config), suite)
        return {"offline": count(before), "online": count(after), "pairs": difference(before, after)}

    seeds = run_seeds(settings, "online-dt", protocol, _config(0, protocol), run_seed)
    measures = {label: measure({s: one[label] for s, one in seeds.items()}) for label in ("offline", "online")}
    measures[_UPLIFT] = paired({seed: one["pairs"] for seed, one in seeds.items()})
    found = answer(
        settings,
        name="online-dt",
        title="Online Decision Transformer",
        question="What does acting add to the same demonstrations, with the same number of updates?",
        protocol=protocol,
        seeds=seeds,
        measures=measures,
        targets=[target("lower end of the uplift's interval", measures[_UPLIFT]["low"], 0.0)],
        notes=["The uplift is of the same evaluation episodes, pair by pair."],
    )
    if not settings.in_process:
        found["path"] = "rollout workers that act through Ray Serve, Redis, Ray Train, judges"
    return found


def figure(result: dict[str, Any], path: Path) -> None:
    bars = {label: found for label, found in result["measures"].items() if label != _UPLIFT}
    draw_bars(path, {"two tabletop tasks": bars}, title="Decision Transformer, with and without acting")


def _config(seed: int, protocol: dict[str, Any]) -> RunConfig:
    """With its ratio of sampling to inserting: a learner that ran ahead would learn from demonstrations alone.

    A run publishes before its first update, so what acts first is the second version.
    """
    config = preset("online-dt")
    updates, offline, versions = protocol["updates"], protocol["offline_updates"], protocol["versions_that_act"]
    publish = (0, *(offline + (updates - offline) * number // versions for number in range(versions)), updates)
    return dataclasses.replace(
        for_comparison(config, seed=seed),
        env=dataclasses.replace(
            config.env,
            tasks=tuple(protocol["tasks"]),
            layouts="split",
            max_episode_steps=protocol["max_episode_steps"],
        ),
        replay=dataclasses.replace(
            config.replay,
            min_steps=50,
            samples_per_insert=protocol["samples_per_insert"],
            # Nothing is inserted while it learns offline.
            error_buffer_steps=float(offline * config.learner.batch_size + 4_000),
        ),
        rollout=dataclasses.replace(
            config.rollout,
            num_workers=1,
            episodes_per_task=protocol["demonstrations_per_task"],
            noise_scales=tuple(protocol["noise"]),
            policy_episodes_per_task=protocol["online_episodes_per_task"],
            policy_from_version=2,
        ),
        learner=dataclasses.replace(
            config.learner,
            total_updates=updates,
            publish_updates=publish,
            checkpoint_every_updates=max(1, updates // 4),
            sample_timeout_s=20.0,
        ),
        # Nobody drives robots here, but a run without them is held to a stricter count of inserts.
        fleet=config.fleet,
    )


def _offline(config: RunConfig) -> RunConfig:
    """The same demonstrations, and nobody acts."""
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, policy_episodes_per_task=0))
