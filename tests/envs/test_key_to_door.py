"""Key-to-Door: rewards need the key, rooms follow the clock, and chance scores what the reference scores."""

import numpy as np
import pytest

from vla_dist.core.errors import ConfigError
from vla_dist.core.types import Step
from vla_dist.envs.key_to_door import ACTIONS, PHASES, KeyToDoorEnv, KeyToDoorExpert
from vla_dist.envs.make import make_env, make_expert

RED, BLUE = 2, 5
ROOM = slice(8, 11)


def act(name: str) -> np.ndarray:
    return np.eye(4, dtype=np.float32)[ACTIONS.index(name)]


def play(env: KeyToDoorEnv, task: str, seed: int, choose) -> list[Step]:
    steps = [env.reset(seed=seed, task=task)]
    while not steps[-1].is_last:
        steps.append(env.step(choose(steps[-1])))
    return steps


def success_rate(task: str, num_episodes: int, make_chooser) -> float:
    env = KeyToDoorEnv((task,))
    return float(np.mean([play(env, task, seed, make_chooser(env, seed))[-1].success for seed in range(num_episodes)]))


def test_chance_scores_about_three_percent():
    rng = np.random.default_rng(0)
    rate = success_rate("one-door", 1500, lambda env, seed: lambda step: np.eye(4)[rng.integers(4)])
    assert 0.018 < rate < 0.045, "0.031 within three standard errors"


@pytest.mark.parametrize("task", ["one-door", "matching-door"])
def test_the_expert_always_gets_through(task: str):
    env = make_env("key-to-door", tasks=(task,), max_episode_steps=200)
    expert = make_expert(env)
    assert isinstance(env, KeyToDoorEnv)

    def choose(step: Step) -> np.ndarray:
        return expert.act(step.observation)

    for seed in range(200):
        expert.reset(task=task, seed=seed)
        steps = play(env, task, seed, choose)
        assert steps[-1].success, seed
        assert sum(step.reward for step in steps) == float(steps[-1].success)


def test_without_the_key_the_door_gives_nothing():
    env = KeyToDoorEnv()
    expert, met = KeyToDoorExpert(env), 0
    for seed in range(40):
        steps = [env.reset(seed=seed, task="one-door")]
        for _ in range(sum(PHASES[:2])):
            row, column = env.cell
            key = env.objects.get(0)
            moves = [m for m in (("north", (row - 1, column)), ("south", (row + 1, column))) if m[1] != key]
            steps.append(env.step(act(moves[0][0])))
        while not steps[-1].is_last:
            steps.append(env.step(expert.act(steps[-1].observation)))
        if not env.has_key:
            met += 1
            assert steps[-1].terminated
            assert not steps[-1].success
            assert sum(step.reward for step in steps) == 0
    assert met > 20


def test_rooms_follow_the_clock_and_the_key_is_not_shown():
    env = KeyToDoorEnv()
    for seed in range(5):
        expert = KeyToDoorExpert(env)
        steps = play(env, "one-door", seed, lambda step, expert=expert: expert.act(step.observation))
        rooms = np.array([step.observation.proprio[ROOM].argmax() for step in steps])
        assert rooms[:10].tolist() == [0] * 10
        assert rooms[10:15].tolist() == [1] * 5
        assert set(rooms[15:]) == {2}
        for step, room in zip(steps, rooms, strict=True):
            assert step.observation.proprio[[RED, BLUE]].sum() <= (0 if room == 1 else 1)


def test_an_object_is_seen_where_it_lies_from_the_robot():
    env = KeyToDoorEnv()
    for seed in range(5):
        proprio = env.reset(seed=seed, task="one-door").observation.proprio
        if env.has_key:
            assert not proprio[RED : RED + 3].any()
            continue
        (key,) = env.objects.values()
        offset = np.array(key) - np.array(env.cell)
        np.testing.assert_allclose(proprio[:2] * 5, env.cell, atol=1e-6)
        np.testing.assert_allclose(proprio[RED : RED + 3], [1.0, *(offset / 5)], atol=1e-6)
        assert not proprio[BLUE : BLUE + 3].any()


def test_the_colour_of_the_key_is_gone_when_the_doors_are_met():
    env = KeyToDoorEnv(("matching-door",))
    colours = set()
    for seed in range(20):
        first = env.reset(seed=seed, task="matching-door").observation.proprio
        colours.add(env.colour)
        if not env.has_key:
            assert first[[RED, BLUE]].tolist() == [float(env.colour == 0), float(env.colour == 1)]
        step = None
        for _ in range(15):
            step = env.step(act("north"))
        assert step is not None
        if not step.is_last:
            assert step.observation.proprio[[RED, BLUE]].sum() == 2
    assert colours == {0, 1}


def test_the_picture_shows_the_room():
    env = KeyToDoorEnv()
    env.reset(seed=0, task="one-door")
    assert env.render().shape == (192, 192, 3)
    with pytest.raises(RuntimeError, match="before the first reset"):
        KeyToDoorEnv().render()


@pytest.mark.parametrize(
    ("tasks", "options", "complaint"),
    [(("locked",), {}, "one-door"), (("one-door",), {"max_episode_steps": 24}, "25 or more")],
)
def test_settings_that_cannot_work_are_refused(tasks, options, complaint: str):
    with pytest.raises(ConfigError, match=complaint):
        KeyToDoorEnv(tasks, **options)
