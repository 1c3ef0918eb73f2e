"""Named runs, each a plain function."""

import dataclasses
import difflib
from collections.abc import Callable

from vla_dist.core.errors import ConfigError
from vla_dist.core.specs import CameraSpec
from vla_dist.run.config import (
    RECORDED,
    EnvSettings,
    EvaluationSettings,
    FleetSettings,
    LearnerSettings,
    ModelSettings,
    ReplaySettings,
    RolloutSettings,
    RunConfig,
)

SINGLE_SCENE_TASKS = ("drawer-open", "drawer-close", "window-open", "window-close", "button-press-topdown")
SHARED_SCENE_TASKS = ("scene/drawer-open", "scene/drawer-close", "scene/button-press")
SEQUENCES = tuple(f"{a}+{b}" for a in SHARED_SCENE_TASKS for b in SHARED_SCENE_TASKS if a != b)
NEVER_SHOWN_SEQUENCES = ("scene/drawer-close+scene/button-press", "scene/button-press+scene/drawer-open")
"""Kept for evaluation; each task is still shown as the first of a sequence and as the second."""
SHOWN_SEQUENCES = tuple(task for task in SEQUENCES if task not in NEVER_SHOWN_SEQUENCES)
MT10_TASKS = (
    *("reach", "push", "pick-place", "door-open", "drawer-open", "drawer-close", "button-press-topdown"),
    *("peg-insert-side", "window-open", "window-close"),
)
"""Meta-World's ten."""

_VIEW = (CameraSpec(name="view", height=56, width=56),)
"""What BabyAI's agent sees, 8 pixels a tile."""
_WORTH_IMITATING = ("demo=0.5", "success=0.5")
"""For models that are told no return: what they are shown, they do, so their own failures stay out of the batches."""


def demo() -> RunConfig:
    """Eight tabletop tasks in words: minutes on two CPU cores."""
    return RunConfig(
        preset="demo",
        env=EnvSettings(tasks=(*SINGLE_SCENE_TASKS, *SHARED_SCENE_TASKS), language_tasks=SHARED_SCENE_TASKS),
        model=ModelSettings(preset="mini"),
    )


def demo_cameras() -> RunConfig:
    """The demo from an 84-pixel camera as well: slower, same path."""
    return RunConfig(
        preset="demo-cameras",
        env=EnvSettings(
            tasks=(*SINGLE_SCENE_TASKS, *SHARED_SCENE_TASKS),
            language_tasks=SHARED_SCENE_TASKS,
            cameras=(CameraSpec(name="table", height=84, width=84),),
        ),
        replay=ReplaySettings(min_steps=1_500, capacity_steps=50_000),
        rollout=RolloutSettings(episodes_per_task=20),
        model=ModelSettings(preset="mini"),
        evaluation=EvaluationSettings(episodes_per_task=2, final_episodes_per_task=4, num_envs=4),
        fleet=FleetSettings(num_robots=2, control_hz=5.0),
    )


def babyai() -> RunConfig:
    """Grid-world missions in words: the whole loop in about a minute."""
    return RunConfig(
        preset="babyai",
        env=EnvSettings(family="babyai", tasks=("GoToRedBallGrey",), max_episode_steps=64),
        replay=ReplaySettings(min_steps=300, samples_per_insert=20.0),
        rollout=RolloutSettings(
            num_workers=1, episodes_per_task=150, noise_scales=(0.0, 0.1), policy_episodes_per_task=5
        ),
        model=ModelSettings(preset="mini"),
        learner=LearnerSettings(
            total_updates=300, publish_updates=(0, 100, 200, 300), batch_size=32, checkpoint_every_updates=50
        ),
        fleet=FleetSettings(num_robots=1, control_hz=20.0),
        evaluation=EvaluationSettings(episodes_per_task=20, final_episodes_per_task=40, num_envs=8),
        min_memory_gib=3.0,
    )


def advantage_tiny() -> RunConfig:
    """BabyAI from clumsy teachers, each step told how much better than expected it turned out."""
    run = _missions("advantage-tiny", ModelSettings(preset="mini", conditioning="advantage"))
    return dataclasses.replace(run, rollout=dataclasses.replace(run.rollout, noise_scales=(0.0, 0.2, 0.4)))


def online_dt() -> RunConfig:
    """Two tabletop tasks by an Online Decision Transformer, half of each batch from its own rollouts."""
    return RunConfig(
        preset="online-dt",
        env=EnvSettings(tasks=("drawer-open", "button-press-topdown")),
        # A small buffer: a learner that runs ahead of the rollouts learns from demonstrations alone.
        replay=ReplaySettings(
            min_steps=400, samples_per_insert=4.0, error_buffer_steps=4_000.0, strata=("demo=0.5", "policy=0.5")
        ),
        rollout=RolloutSettings(
            num_workers=1,
            episodes_per_task=20,
            noise_scales=(0.2, 0.4, 0.8),
            policy_episodes_per_task=20,
            policy_from_version=2,
        ),
        model=ModelSettings(preset="mini", changes=("head=gaussian",)),
        learner=LearnerSettings(
            algorithm="online_decision_transformer",
            total_updates=600,
            publish_updates=(0, 150, 300, 450, 600),
            checkpoint_every_updates=150,
        ),
        fleet=FleetSettings(num_robots=1),
        evaluation=EvaluationSettings(episodes_per_task=5, final_episodes_per_task=10, num_envs=4),
        min_memory_gib=3.0,
    )


def key_to_door() -> RunConfig:
    """A thousand random walks, one in thirty of which finds a key and, rooms later, its door."""
    return RunConfig(
        preset="key-to-door",
        env=EnvSettings(family="key-to-door", tasks=("one-door",), max_episode_steps=25, layouts="split"),
        replay=ReplaySettings(min_steps=2_000, segment_steps=25, strata=("success=0.5", "failure=0.5")),
        rollout=RolloutSettings(num_workers=1, teacher="random", episodes_per_task=1_000),
        model=ModelSettings(
            preset="small",
            changes=("hidden_dim=64", "n_layers=2", "goal_dim=0", "dropout=0.2"),
            # A longer past tells random walks apart, and their moves are then learnt by heart.
            context_steps=4,
            action_dropout=0.0,
            return_dropout=0.0,
            conditioning="reward",
            target_quantile=1.0,
        ),
        learner=LearnerSettings(
            total_updates=400, publish_updates=(0, 100, 400), checkpoint_every_updates=100, scales_from="successes"
        ),
        fleet=FleetSettings(num_robots=1),
        evaluation=EvaluationSettings(episodes_per_task=100, final_episodes_per_task=200, num_envs=32),
        min_memory_gib=3.0,
    )


def t_maze() -> RunConfig:
    """A sign at the start of a corridor of up to 30 cells, read in windows of 16: only a memory knows which way."""
    return RunConfig(
        preset="t-maze",
        env=EnvSettings(family="t-maze", tasks=("length-5-30",), max_episode_steps=70),
        replay=ReplaySettings(min_steps=1_000, samples_per_insert=40.0, strata=_WORTH_IMITATING),
        rollout=RolloutSettings(num_workers=1, episodes_per_task=300, noise_scales=(0.0,)),
        model=ModelSettings(architecture="memory", preset="tiny", changes=("goal_dim=0",), conditioning="none"),
        learner=LearnerSettings(
            total_updates=800,
            publish_updates=(0, 300, 800),
            checkpoint_every_updates=200,
        ),
        fleet=FleetSettings(num_robots=1),
        evaluation=EvaluationSettings(episodes_per_task=50, final_episodes_per_task=100, num_envs=32),
        min_memory_gib=3.0,
    )


def metaworld_mt10() -> RunConfig:
    """Meta-World's ten tasks and the three of the shared scene from state, in words: one token a step."""
    return RunConfig(
        preset="metaworld-mt10",
        env=EnvSettings(
            tasks=(*MT10_TASKS, *SHARED_SCENE_TASKS),
            language_tasks=SHARED_SCENE_TASKS,
            layouts="split",
            shows_goal=True,
        ),
        replay=ReplaySettings(samples_per_insert=20.0, strata=_WORTH_IMITATING),
        rollout=RolloutSettings(episodes_per_task=50),
        model=ModelSettings(preset="tiny", conditioning="none"),
        learner=LearnerSettings(
            total_updates=16_000, publish_updates=(0, 4_000, 16_000), checkpoint_every_updates=2_000
        ),
        fleet=FleetSettings(num_robots=2),
        evaluation=EvaluationSettings(episodes_per_task=5, final_episodes_per_task=20, num_envs=8),
    )


def memory_tiny() -> RunConfig:
    """T-mazes with the memory-augmented model: only the first cell tells which way to turn at the end."""
    run = babyai()
    return dataclasses.replace(
        run,
        preset="memory-tiny",
        env=EnvSettings(family="t-maze", tasks=("length-5-30",), max_episode_steps=70),
        replay=dataclasses.replace(run.replay, strata=_WORTH_IMITATING),
        model=ModelSettings(architecture="memory", preset="tiny", conditioning="none"),
        learner=dataclasses.replace(
            run.learner, total_updates=900, publish_updates=(0, 150, 300, 900), learning_rate=3e-3
        ),
    )


def hierarchical_tiny() -> RunConfig:
    """Three tasks of one scene: a planner finds the skill in the words, a controller executes it."""
    skills = ",".join(f'"{task}"' for task in SHARED_SCENE_TASKS)
    changes = (f"skills=[{skills}]", "hold_steps=10", "low_level_dim=128", "hidden_dim=256")
    return RunConfig(
        preset="hierarchical-tiny",
        env=EnvSettings(tasks=SHARED_SCENE_TASKS, language_tasks=SHARED_SCENE_TASKS),
        replay=ReplaySettings(min_steps=800, samples_per_insert=20.0, strata=_WORTH_IMITATING),
        rollout=RolloutSettings(episodes_per_task=40),
        model=ModelSettings(architecture="hierarchical", preset="tiny", changes=changes, conditioning="none"),
        learner=LearnerSettings(total_updates=1_500, publish_updates=(0, 200, 600, 1_500)),
        fleet=FleetSettings(num_robots=1),
        evaluation=EvaluationSettings(episodes_per_task=5, final_episodes_per_task=20, num_envs=4),
        min_memory_gib=3.0,
    )


def hierarchical_sketch() -> RunConfig:
    """Two of three tasks in a row: a planner reads their order from the words, and each skill says when it is over."""
    skills = ",".join(f'"{task}"' for task in SHARED_SCENE_TASKS)
    changes = (
        f"skills=[{skills}]",
        *("learned_termination=true", "planner=sketch", "goal_clauses=2", "goal_dim=768"),
        *("context_steps=16", "controller_context_steps=4", "hidden_dim=128"),
    )
    return RunConfig(
        preset="hierarchical-sketch",
        env=EnvSettings(
            tasks=(*SHOWN_SEQUENCES, *SHARED_SCENE_TASKS), language_tasks=SHARED_SCENE_TASKS, max_episode_steps=300
        ),
        replay=ReplaySettings(min_steps=1_500, samples_per_insert=20.0, strata=_WORTH_IMITATING),
        rollout=RolloutSettings(episodes_per_task=40),
        model=ModelSettings(architecture="hierarchical", preset="tiny", changes=changes, conditioning="none"),
        learner=LearnerSettings(total_updates=4_000, publish_updates=(0, 1_500, 4_000)),
        fleet=FleetSettings(num_robots=1),
        evaluation=EvaluationSettings(episodes_per_task=3, final_episodes_per_task=10, num_envs=4),
        min_memory_gib=3.0,
    )


def rt1_tiny() -> RunConfig:
    """BabyAI through RT-1's eyes: the agent's view as a camera beside its symbols."""
    return _missions("rt1-tiny", ModelSettings(architecture="rt1", preset="tiny", conditioning="none"), cameras=_VIEW)


def bcz_tiny() -> RunConfig:
    """BabyAI with BC-Z, which sends the robot four actions at a time."""
    model = ModelSettings(architecture="bcz", preset="tiny", changes=("horizon=4",), conditioning="none")
    return _missions("bcz-tiny", model, cameras=_VIEW)


def vla_tiny() -> RunConfig:
    """BabyAI with the composed model: its view, its symbols and the words fused by gates, four actions at a time."""
    model = ModelSettings(architecture="vla", preset="tiny", conditioning="none")
    return _missions("vla-tiny", model, cameras=_VIEW)


def _missions(name: str, model: ModelSettings, *, cameras: tuple[CameraSpec, ...] = ()) -> RunConfig:
    """The ``babyai`` run with another model, and with the agent's view as a camera where the model needs one."""
    run = babyai()
    told = model.conditioning != "none"
    replay = run.replay if told else dataclasses.replace(run.replay, strata=_WORTH_IMITATING)
    env = dataclasses.replace(run.env, cameras=cameras)
    return dataclasses.replace(run, preset=name, model=model, env=env, replay=replay)


def recorded() -> RunConfig:
    """Robots that are no simulator: what they recorded is learnt from and served back to them."""
    return RunConfig(
        preset="recorded",
        env=EnvSettings(family=RECORDED),
        # Nothing is added while it learns: neither side has to wait for the other.
        replay=ReplaySettings(
            min_steps=200, samples_per_insert=1.0, error_buffer_steps=1e12, image_encodings=("jpeg:95",)
        ),
        rollout=RolloutSettings(num_workers=1, teacher="none"),
        model=ModelSettings(preset="mini"),
        fleet=FleetSettings(num_robots=0),
        min_memory_gib=3.0,
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "demo": demo,
    "demo-cameras": demo_cameras,
    "babyai": babyai,
    "advantage-tiny": advantage_tiny,
    "online-dt": online_dt,
    "key-to-door": key_to_door,
    "t-maze": t_maze,
    "metaworld-mt10": metaworld_mt10,
    "memory-tiny": memory_tiny,
    "hierarchical-tiny": hierarchical_tiny,
    "hierarchical-sketch": hierarchical_sketch,
    "rt1-tiny": rt1_tiny,
    "bcz-tiny": bcz_tiny,
    "vla-tiny": vla_tiny,
    "recorded": recorded,
}


def preset(name: str) -> RunConfig:
    """A preset by name. Raises ConfigError with the nearest names."""
    if name in PRESETS:
        return PRESETS[name]()
    near = difflib.get_close_matches(name, PRESETS, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ConfigError(f"no preset {name!r}; {hint}The presets are {', '.join(PRESETS)}.")
