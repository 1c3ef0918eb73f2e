"""Two tasks in a row, in one scene: does a planner of skills above a controller do what one policy cannot?

Six sequences of opening, closing and pressing; a pressed button springs back, so what was done may no longer be seen.
Each of the three is demonstrated alone as well: from sequences alone what belongs to which skill is guessed wrongly.
The flat policy and the hierarchy have as many parameters, the same demonstrations, updates and batch. The ablations put
another in the planner's place: an oracle that knows which task is due, and chance.
"""

import dataclasses
from pathlib import Path
from typing import Any

from learn_parts.levels import MODELS, draw_levels, run_levels
from learn_parts.seeds import for_comparison

from learn.settings import Settings
from vla_dist.run.config import RunConfig
from vla_dist.run.presets import SHARED_SCENE_TASKS, preset

_SEQUENCES = tuple(f"{a}+{b}" for a in SHARED_SCENE_TASKS for b in SHARED_SCENE_TASKS if a != b)


def run(settings: Settings) -> dict[str, Any]:
    quick = settings.quick
    judged = _SEQUENCES[:2] if quick else _SEQUENCES
    protocol = {
        "tasks": list(judged),
        "also_demonstrated": list(SHARED_SCENE_TASKS),
        "layouts": "split",
        "episodes_per_task": 3 if quick else 50,
        "noise": [0.0, 0.2],
        "updates": 12 if quick else 6_000,
        "batch": 64,
        **MODELS,
        "max_episode_steps": 60 if quick else 300,
        "evaluation_episodes_per_task": 1 if quick else 15,
    }

    return run_levels(
        settings,
        name="hierarchy",
        title="Hierarchy: two tasks in a row",
        question="At equal parameters and demonstrations, does a planner above a controller get further than one "
        "policy?",
        protocol=protocol,
        skills=SHARED_SCENE_TASKS,
        judged=judged,
        config=lambda seed: _config(seed, protocol),
    )


def figure(result: dict[str, Any], path: Path) -> None:
    draw_levels(result, path, what="two tasks in a row", title="Drawer and button: flat and hierarchical")


def _config(seed: int, protocol: dict[str, Any]) -> RunConfig:
    config = for_comparison(preset("metaworld-mt10"), seed=seed)
    return dataclasses.replace(
        config,
        preset="hierarchy",
        env=dataclasses.replace(
            config.env,
            tasks=(*protocol["tasks"], *protocol["also_demonstrated"]),
            language_tasks=(),
            max_episode_steps=protocol["max_episode_steps"],
            shows_goal=False,
        ),
        rollout=dataclasses.replace(
            config.rollout, episodes_per_task=protocol["episodes_per_task"], noise_scales=tuple(protocol["noise"])
        ),
        replay=dataclasses.replace(config.replay, min_steps=50),
    )
