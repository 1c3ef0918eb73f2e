"""T-maze: the sign is seen once, the turn decides, and no policy without memory can know it."""

import numpy as np
import pytest

from vla_dist.core.errors import ConfigError
from vla_dist.envs.make import make_env, make_expert
from vla_dist.envs.t_maze import ACTIONS, TMazeEnv
from vla_dist.rollout.behaviour import NoisyExpert
from vla_dist.rollout.episode import run_episode


def act(name: str) -> np.ndarray:
    return np.eye(4, dtype=np.float32)[ACTIONS.index(name)]


@pytest.mark.parametrize("length", [5, 1000])
def test_the_sign_is_seen_at_the_start_and_never_again(length: int):
    env = TMazeEnv((f"length-{length}",))
    step = env.reset(seed=1, task=f"length-{length}")
    assert step.observation.proprio[:2].sum() == 1
    sign = "north" if step.observation.proprio[0] else "south"
    for place in range(1, length + 1):
        step = env.step(act("east"))
        assert step.observation.proprio.tolist() == ([0, 0, 0, 1] if place == length else [0, 0, 1, 0])
    assert not step.is_last
    step = env.step(act(sign))
    assert (step.reward, step.terminated, step.success) == (4.0, True, True)


def test_a_wrong_turn_ends_the_episode_and_walls_cost():
    env = TMazeEnv(("length-5",))
    env.reset(seed=1, task="length-5")
    for name in ("west", "north", "south"):
        assert env.step(act(name)).reward == -0.1
    assert env.step(act("east")).reward == 0
    assert env.step(act("west")).observation.proprio[:2].sum() == 1, "back at the sign it is seen again"
    for _ in range(5):
        env.step(act("east"))
    wrong = "south" if env.way == "north" else "north"
    step = env.step(act(wrong))
    assert (step.reward, step.terminated, step.success) == (-0.1, True, False)


def test_seeds_draw_both_sides_and_all_lengths():
    env = TMazeEnv(("length-5-8",))
    seen = set()
    for seed in range(60):
        env.reset(seed=seed, task="length-5-8")
        steps = 0
        while not env.is_at_junction:
            env.step(act("east"))
            steps += 1
        seen.add((steps, env.way))
    assert seen == {(length, way) for length in range(5, 9) for way in ("north", "south")}


def test_a_noisy_expert_collects_episodes_that_end_well():
    env = make_env("t-maze", tasks=("length-5-30",), max_episode_steps=200)
    expert = NoisyExpert(make_expert(env), env.spec, noise_scales=(0.0, 0.1))
    ends = []
    for seed in range(20):
        segments = list(
            run_episode(
                env, expert, task="length-5-30", seed=seed, episode_id=f"e{seed}", robot_id="r", segment_steps=16
            )
        )
        ends.append(segments[-1].success)
    assert np.mean(ends) >= 0.8


def test_the_picture_shows_the_maze():
    env = TMazeEnv(("length-1000", "length-5"))
    env.reset(seed=0, task="length-5")
    assert env.render().shape == (5 * 16, 8 * 16, 3)
    env.reset(seed=0, task="length-1000")
    assert env.render().shape[1] <= 1280
    with pytest.raises(ConfigError, match="one view"):
        env.render("eye")


@pytest.mark.parametrize(
    ("tasks", "options", "complaint"),
    [
        ((), {}, "non-empty"),
        (("length-4",), {}, "length-L"),
        (("length-9-8",), {}, "length-L"),
        (("length-1001",), {}, "length-L"),
        (("corridor",), {}, "length-L"),
        (("length-30",), {"max_episode_steps": 30}, "does not reach"),
        (("length-30",), {"instructions": "held_out"}, "wordings"),
    ],
)
def test_settings_that_cannot_work_are_refused(tasks, options, complaint: str):
    with pytest.raises(ConfigError, match=complaint):
        TMazeEnv(tasks, **options)
