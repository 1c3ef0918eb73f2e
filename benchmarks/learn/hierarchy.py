"""Two tasks in a row, in one scene: does a planner of skills above a controller do what one policy cannot?

Opening, closing and pressing make six sequences; a pressed button springs back, so what was done may no longer be seen.
Four of them are demonstrated, and each of the three tasks alone: from sequences alone what belongs to which skill is
guessed wrongly. The other two are judged as well: known parts in an order that was never shown. The flat policy has as
many parameters as the larger hierarchy, the same words, demonstrations, updates and batch. The ablations put another in
the planner's place: an oracle that knows which task is due, and chance.
"""

import dataclasses
from pathlib import Path
from typing import Any

from learn_parts.levels import LevelModels, draw_levels, run_levels
from learn_parts.seeds import for_comparison

from learn.settings import Settings
from vla_dist.run.config import RunConfig
from vla_dist.run.presets import NEVER_SHOWN_SEQUENCES, SHARED_SCENE_TASKS, SHOWN_SEQUENCES, preset

_MODELS = LevelModels(clauses=2, looks=True)
_SHOWN, _UNSHOWN = "sequences shown", "sequences never shown"


def run(settings: Settings) -> dict[str, Any]:
    quick = settings.quick
    shown, never_shown = (group[: 1 if quick else None] for group in (SHOWN_SEQUENCES, NEVER_SHOWN_SEQUENCES))
    protocol = {
        "demonstrated": [*shown, *SHARED_SCENE_TASKS],
        "never_demonstrated": list(never_shown),
        "layouts": "split",
        "episodes_per_task": 3 if quick else 50,
        "noise": [0.0, 0.2],
        "updates": 12 if quick else 6_000,
        "batch": 64,
        **_MODELS.protocol(),
        "max_episode_steps": 60 if quick else 300,
        "evaluation_episodes_per_task": 1 if quick else 30,
    }

    return run_levels(
        settings,
        name="hierarchy",
        title="Hierarchy: two tasks in a row",
        question="At equal parameters and demonstrations, does a planner above a controller get further than one "
        "policy, in sequences that were shown and in those that were not?",
        protocol=protocol,
        skills=SHARED_SCENE_TASKS,
        groups={_SHOWN: shown, _UNSHOWN: never_shown},
        config=lambda seed: _config(seed, protocol),
        sizes=_MODELS,
        notes=[
            "`hierarchy` reads the order of skills from the words and goes on where a skill says that it is done; "
            "`planner that looks` names a skill from what it sees, every five steps."
        ],
    )


def figure(result: dict[str, Any], path: Path) -> None:
    draw_levels(result, path, what="sequences", title="Drawer and button: flat and hierarchical")


def _config(seed: int, protocol: dict[str, Any]) -> RunConfig:
    config = for_comparison(preset("metaworld-mt10"), seed=seed)
    return dataclasses.replace(
        config,
        preset="hierarchy",
        env=dataclasses.replace(
            config.env,
            tasks=tuple(protocol["demonstrated"]),
            language_tasks=(),
            max_episode_steps=protocol["max_episode_steps"],
            shows_goal=False,
        ),
        rollout=dataclasses.replace(
            config.rollout, episodes_per_task=protocol["episodes_per_task"], noise_scales=tuple(protocol["noise"])
        ),
        replay=dataclasses.replace(config.replay, min_steps=50),
    )
