import subprocess
import sys

import numpy as np
import pytest

from vla_dist.core.errors import ConfigError
from vla_dist.core.seeding import evaluation_seed
from vla_dist.core.specs import CameraSpec
from vla_dist.core.types import Step
from vla_dist.envs.drawer_button import SCENE_SEQUENCES, SCENE_TASKS
from vla_dist.envs.experts import MetaWorldExpert
from vla_dist.envs.instructions import WORDED_TASKS
from vla_dist.envs.metaworld import MetaWorldEnv

DEMO_TASKS = ("drawer-open", "drawer-close", "window-open", "window-close", "button-press-topdown")
_OBJECT_1, _OBJECT_2 = slice(4, 7), slice(11, 14)

_FINGERPRINT = """
import hashlib, numpy as np
from vla_dist.envs.metaworld import MetaWorldEnv
env = MetaWorldEnv(("drawer-close", "push", "scene/button-press"))
digest = hashlib.sha256()
for task in env.tasks:
    step = env.reset(seed=2**31 + 5, task=task)
    rng = np.random.default_rng(0)
    for _ in range(12):
        digest.update(step.observation.proprio.tobytes() + repr(step.reward).encode())
        digest.update(step.observation.instruction.encode())
        step = env.step(rng.uniform(-1, 1, 4).astype(np.float32))
print(digest.hexdigest())
"""


@pytest.fixture(scope="module")
def env() -> MetaWorldEnv:
    return MetaWorldEnv((*DEMO_TASKS, *SCENE_TASKS, "reach", "push"))


def run_expert(env: MetaWorldEnv, task: str, seed: int, instruction: str | None = None) -> list[Step]:
    """The expert of ``task`` in an episode of that task."""
    expert = MetaWorldExpert(env)
    steps = [env.reset(seed=seed, task=task, instruction=instruction)]
    expert.reset(task=task, seed=seed)
    while not steps[-1].is_last:
        steps.append(env.step(expert.act(steps[-1].observation)))
    return steps


def test_equal_seeds_are_bitwise_equal_across_processes() -> None:
    digests = {
        subprocess.run(
            [sys.executable, "-c", _FINGERPRINT], capture_output=True, text=True, check=True, timeout=100
        ).stdout
        for _ in range(2)
    }
    assert len(digests) == 1
    assert len(digests.pop().strip()) == 64


@pytest.mark.parametrize("task", WORDED_TASKS)
def test_an_episode_does_not_depend_on_the_one_before(task: str) -> None:
    used, fresh = MetaWorldEnv((task,)), MetaWorldEnv((task,))
    used.reset(seed=11, task=task)
    for _ in range(10):
        used.step(np.array([0.3, 1.0, -1.0, 1.0], np.float32))
    left, right = used.reset(seed=12, task=task), fresh.reset(seed=12, task=task)
    for _ in range(4):
        assert left.observation.proprio.tobytes() == right.observation.proprio.tobytes()
        assert left.reward == right.reward
        action = np.array([0.1, 0.5, -0.5, -1.0], np.float32)
        left, right = used.step(action), fresh.step(action)


@pytest.mark.parametrize("task", ["drawer-open", "window-open", "button-press-topdown", *SCENE_TASKS])
def test_first_observation_shows_the_layout_of_this_episode(env: MetaWorldEnv, task: str) -> None:
    for seed in range(3):
        first = env.reset(seed=seed, task=task).observation.proprio
        second = env.step(np.zeros(4, np.float32)).observation.proprio
        np.testing.assert_allclose(first[_OBJECT_1], second[_OBJECT_1], atol=0.005)
        np.testing.assert_array_equal(first[:18], first[18:36])
        np.testing.assert_array_equal(first[:18], second[18:36])


def test_goal_is_hidden_from_the_policy_and_shown_to_the_expert(env: MetaWorldEnv) -> None:
    step = env.reset(seed=1, task="reach")
    assert not step.observation.proprio[36:].any()
    assert env.full_observation()[36:].any()
    step = env.step(np.zeros(4, np.float32))
    assert not step.observation.proprio[36:].any()
    assert env.full_observation()[36:].any()


def test_spec_is_the_same_for_every_task_and_names_each_number() -> None:
    plain, scene = MetaWorldEnv(("reach",)).spec, MetaWorldEnv(("scene/drawer-open",)).spec
    assert plain.digest == scene.digest
    assert plain.proprio_dim == 39
    assert [d.name for d in plain.proprio[:5]] == ["hand_x", "hand_y", "hand_z", "gripper_opening", "object_1_x"]
    assert plain.proprio[11].name == "object_2_x"
    assert plain.proprio[18].name == "previous_hand_x"
    assert plain.proprio[38].name == "goal_z_masked"
    assert [(d.low, d.high) for d in plain.action] == [(-1.0, 1.0)] * 4


@pytest.mark.parametrize("task", [*DEMO_TASKS, *SCENE_TASKS])
def test_expert_succeeds_and_success_ends_the_episode(env: MetaWorldEnv, task: str) -> None:
    for index in range(2):
        steps = run_expert(env, task, evaluation_seed(1, index))
        assert steps[-1].success
        assert steps[-1].terminated
        assert task in steps[-1].info["achieved"]
        assert not any(step.success for step in steps[:-1])
        assert len(steps) < 150


def test_scene_tasks_share_their_initial_states(env: MetaWorldEnv) -> None:
    starts = [env.reset(seed=9, task=task).observation.proprio.tobytes() for task in SCENE_TASKS]
    assert len(set(starts)) == 1
    assert env.reset(seed=9, task=SCENE_TASKS[0]).info["achieved"] == ()


def test_scene_layouts_spread_and_swap_sides(env: MetaWorldEnv) -> None:
    starts = np.array([env.reset(seed=s, task=SCENE_TASKS[0]).observation.proprio for s in range(40)])
    drawer, button = starts[:, _OBJECT_1], starts[:, _OBJECT_2]
    assert (np.sign(drawer[:, 0]) == -np.sign(button[:, 0])).all()
    assert 5 < (drawer[:, 0] > 0).sum() < 35
    for side in (drawer[:, 0], button[:, 0]):
        assert np.ptp(np.abs(side)) > 0.12
    handle_travel = drawer[:, 1].max() - drawer[:, 1].min()
    assert handle_travel > 0.03


def test_wrong_instruction_run_shows_what_was_done_instead(env: MetaWorldEnv) -> None:
    """The episode asks for the button; an obedient policy is told to open the drawer, and does."""
    opener = MetaWorldEnv(("scene/drawer-open",))
    actions = []
    step, expert = opener.reset(seed=4, task="scene/drawer-open"), MetaWorldExpert(opener)
    expert.reset(task="scene/drawer-open", seed=4)
    while not step.is_last:
        actions.append(expert.act(step.observation))
        step = opener.step(actions[-1])
    step = env.reset(seed=4, task="scene/button-press", instruction="open the drawer")
    for action in actions:
        step = env.step(action)
    assert step.info["achieved"] == ("scene/drawer-open",)
    assert not step.success
    assert not step.is_last
    assert step.observation.instruction == "open the drawer"


def test_truncation_comes_at_the_limit_and_longer_limits_than_meta_worlds_are_refused() -> None:
    env = MetaWorldEnv(("reach",), max_episode_steps=3)
    env.reset(seed=0, task="reach")
    ends = [env.step(np.zeros(4, np.float32)).truncated for _ in range(3)]
    assert ends == [False, False, True]
    with pytest.raises(ConfigError, match=r"1\.\.500"):
        MetaWorldEnv(("reach",), max_episode_steps=501)


def test_held_out_wording_is_chosen_on_request() -> None:
    training, held_out = (
        {
            MetaWorldEnv(("scene/button-press",), instructions=split)
            .reset(seed=s, task="scene/button-press")
            .observation.instruction
            for s in range(3)
        }
        for split in ("training", "held_out")
    )
    assert not training & held_out


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="non-empty"):
        MetaWorldEnv(())
    with pytest.raises(ConfigError, match=r"unknown tasks \['fly'\]"):
        MetaWorldEnv(("fly", "reach"))
    with pytest.raises(ConfigError, match=r"unknown cameras \['nose'\]"):
        MetaWorldEnv(("reach",), cameras=(CameraSpec(name="nose", height=8, width=8),))
    with pytest.raises(ConfigError, match="held_out"):
        MetaWorldEnv(("reach",), instructions="test")  # type: ignore[arg-type]


def test_simulators_are_dropped_when_too_many_tasks_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vla_dist.envs.metaworld._MAX_SIMULATORS", 2)
    env = MetaWorldEnv(("reach", "drawer-open", "window-open"))
    first = env.reset(seed=3, task="reach").observation.proprio
    for task in env.tasks[1:]:
        env.reset(seed=3, task=task)
    assert list(env._simulators) == ["drawer-open", "window-open"]
    np.testing.assert_array_equal(env.reset(seed=3, task="reach").observation.proprio, first)


def test_expert_refuses_a_task_of_another_environment_and_acts_only_after_reset(env: MetaWorldEnv) -> None:
    expert = MetaWorldExpert(env)
    with pytest.raises(ConfigError, match="door-open"):
        expert.reset(task="door-open", seed=0)
    step = env.reset(seed=0, task="reach")
    with pytest.raises(RuntimeError, match="call reset"):
        expert.act(step.observation)


def test_two_tasks_in_a_row_are_done_in_their_order() -> None:
    task = "scene/button-press+scene/drawer-open"
    env = MetaWorldEnv((task,), max_episode_steps=300)
    skills, expert = [], MetaWorldExpert(env)
    step = env.reset(seed=evaluation_seed(3, 0), task=task)
    expert.reset(task=task, seed=0)
    rewards = []
    while not step.is_last:
        skills.append(env.skill)
        step = env.step(expert.act(step.observation))
        rewards.append(step.reward)
    assert step.success
    assert task in step.info["achieved"]
    change = skills.index("scene/drawer-open")
    assert set(skills[:change]) == {"scene/button-press"}
    assert set(skills[change:]) == {"scene/drawer-open"}
    assert max(rewards[: change - 1]) < 5.0 <= min(rewards[change - 1 :])
    assert rewards[-1] == 10.0
    assert env.reset(seed=5, task=task).observation.instruction.count(", then ") == 1
    assert env.skill == "scene/button-press"


@pytest.mark.parametrize("task", SCENE_SEQUENCES)
def test_the_expert_does_any_two_tasks_of_the_scene_in_a_row(task: str) -> None:
    env = MetaWorldEnv((task,), max_episode_steps=300)
    expert = MetaWorldExpert(env)
    for index in range(3):
        step = env.reset(seed=evaluation_seed(4, index), task=task)
        expert.reset(task=task, seed=0)
        while not step.is_last:
            step = env.step(expert.act(step.observation))
        assert step.success, f"episode {index}"


def test_the_second_task_alone_is_not_the_sequence() -> None:
    task = "scene/drawer-open+scene/drawer-close"
    env = MetaWorldEnv((task, "scene/drawer-close"), max_episode_steps=120)
    closer = MetaWorldExpert(env)
    step = env.reset(seed=evaluation_seed(3, 1), task=task)
    closer.reset(task="scene/drawer-close", seed=0)
    closed = False
    while not step.is_last:
        step = env.step(closer.act(step.observation))
        closed |= "scene/drawer-close" in step.info["achieved"]
    assert closed
    assert not step.success
