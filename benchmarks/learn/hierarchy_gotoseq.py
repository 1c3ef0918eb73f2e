"""Go to this, then to that: ``hierarchy`` on missions of BabyAI's GoToSeq, told in a sentence of up to four parts.

The level is BabyAI's generator of it in a single room with eight things: the large one, nine rooms, needs more
demonstrations than two cores collect. A skill is to go to one kind of thing, of one colour or any; each alone is
demonstrated as well (GoToLocal, the same room). The robot sees the 7 x 7 cells before it.

**The limit of steps makes the words necessary.** Nothing is spoilt by going to a wrong thing, so whoever walks about
long enough has been to the right ones in the right order. The bot takes 13 steps in the mean, and 24 or fewer in 94 of
100 missions.
"""

import dataclasses
from pathlib import Path
from typing import Any

from learn_parts.levels import LevelModels, draw_levels, run_levels
from learn_parts.seeds import for_comparison

from learn.settings import Settings
from vla_dist.run.config import RunConfig
from vla_dist.run.presets import preset

_TASK, _PART = "GoToSeqLocal", "GoToLocal"
_MODELS = LevelModels(clauses=4, width=128, hidden=256, subgoal=32, fusion="film", alignment="episode")
_COLOURS = ("", "red", "green", "blue", "purple", "yellow", "grey")
SKILLS = tuple(
    " ".join(filter(None, ("go to", colour, kind))) for kind in ("ball", "box", "key", "door") for colour in _COLOURS
)


def run(settings: Settings) -> dict[str, Any]:
    quick = settings.quick
    protocol = {
        "task": _TASK,
        "demonstrated": [_TASK, _PART],
        "layouts": "split",
        "demonstrations_of_each": 60 if quick else 8_000,
        "noise": [0.0, 0.1],
        "updates": 12 if quick else 3_000,
        "batch": 64,
        **_MODELS.protocol(),
        "skills": f"{len(SKILLS)}: go to a ball, box, key or door of one colour or any",
        "max_episode_steps": 24,
        "evaluation_episodes_per_task": 8 if quick else 200,
    }

    return run_levels(
        settings,
        name="hierarchy-gotoseq",
        title="Hierarchy: BabyAI's GoToSeq",
        question="Of the same demonstrations, does a planner above a controller follow sentences of several parts "
        "further than one policy that has no fewer parameters? Within 24 steps, of which the bot takes 13 in the mean: "
        "whoever walks about long enough needs no words.",
        protocol=protocol,
        skills=SKILLS,
        groups={"": (_TASK,)},
        config=lambda seed: _config(seed, protocol),
        sizes=_MODELS,
    )


def figure(result: dict[str, Any], path: Path) -> None:
    draw_levels(result, path, what=_TASK, title="BabyAI, go to this and then to that: flat and hierarchical")


def _config(seed: int, protocol: dict[str, Any]) -> RunConfig:
    config = for_comparison(preset("babyai"), seed=seed)
    return dataclasses.replace(
        config,
        preset="hierarchy-gotoseq",
        env=dataclasses.replace(
            config.env, tasks=(_TASK, _PART), max_episode_steps=protocol["max_episode_steps"], layouts="split"
        ),
        rollout=dataclasses.replace(
            config.rollout,
            num_workers=2,
            episodes_per_task=protocol["demonstrations_of_each"],
            noise_scales=tuple(protocol["noise"]),
            policy_episodes_per_task=0,
        ),
        replay=dataclasses.replace(config.replay, min_steps=50),
        learner=dataclasses.replace(config.learner, batch_size=protocol["batch"]),
        evaluation=dataclasses.replace(config.evaluation, num_envs=32),
    )
