"""Nothing of evaluation can be had in training: not a seed, not a wording, not a beginning of an episode."""

import dataclasses

import numpy as np
import pytest

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.core.seeding import (
    evaluation_seed,
    is_evaluation_seed,
    redrawn_seed,
    rehearsal_seed,
    training_seed,
)
from vla_dist.core.specs import Dimension, EnvSpec
from vla_dist.core.types import Observation, Step
from vla_dist.envs.instructions import WORDED_TASKS, instruction_for, phrases
from vla_dist.envs.layout_split import SplitLayouts, is_evaluation_layout
from vla_dist.envs.make import make_env, make_expert
from vla_dist.evaluation.suite import SuiteConfig
from vla_dist.run.composition.place import build_env
from vla_dist.run.phrases import phrase_source, training_phrases
from vla_dist.run.presets import PRESETS, preset
from vla_dist.testing.env_contract import check_env


def test_no_seed_is_of_both_sides():
    rng = np.random.default_rng(0)
    for run_seed, lane, index in rng.integers((2**16, 1024, 2**20), size=(500, 3)).tolist():
        assert not is_evaluation_seed(training_seed(run_seed, lane, index))
        assert is_evaluation_seed(evaluation_seed(run_seed, index))


def test_a_seed_that_is_drawn_again_stays_on_its_side():
    for seed in (0, 5, 2**31 - 1, 2**31, 2**32 - 1):
        again = [redrawn_seed(seed, draw) for draw in range(20)]
        assert again[0] == seed
        assert len(set(again)) == 20
        assert {is_evaluation_seed(other) for other in again} == {is_evaluation_seed(seed)}
        assert max(again) < 2**32


def test_every_suite_of_every_preset_has_evaluation_seeds_alone():
    for name in PRESETS:
        config = preset(name)
        if not config.env.has_simulator:
            continue
        suite = SuiteConfig(tasks=config.env.tasks, episodes_per_task=20, seed=config.evaluation.seed)
        assert all(is_evaluation_seed(seed) for _, seed, _ in suite.episodes())


def test_rehearsals_have_training_seeds_that_no_worker_draws():
    seeds = {rehearsal_seed(3, index) for index in range(200)}
    assert len(seeds) == 200
    assert not any(map(is_evaluation_seed, seeds))
    drawn = {training_seed(3, worker, index) for worker in (0, 1, 512) for index in range(200)}
    assert seeds.isdisjoint(drawn)


def test_no_held_out_wording_is_a_training_wording_of_any_task():
    training = {plain(words) for task in WORDED_TASKS for words in phrases(task, "training")}
    held_out = {plain(words) for task in WORDED_TASKS for words in phrases(task, "held_out")}
    assert held_out
    assert training.isdisjoint(held_out)


def plain(words: str) -> str:
    return " ".join(words.lower().replace("-", " ").strip(" .!").split())


def test_a_learner_is_given_training_wordings_and_a_judge_those_it_was_asked_for():
    config = preset("metaworld-mt10")
    given = {words for found in training_phrases(config).values() for words in found}
    for split in ("training", "held_out"):
        say = phrase_source(config, split)
        said = {say(task, evaluation_seed(1, index)) for task in config.env.tasks for index in range(30)}
        assert said <= given if split == "training" else given.isdisjoint(said)


def beginnings(env, task, seeds):
    return {env.reset(seed=seed, task=task).observation.proprio.round(4).tobytes() for seed in seeds}


@pytest.mark.parametrize(
    ("family", "task", "num_training"), [("key-to-door", "one-door", 800), ("babyai", "GoToRedBallGrey", 200)]
)
def test_split_layouts_share_no_beginning_where_plain_seeds_do(family, task, num_training):
    training = [training_seed(0, 0, index) for index in range(num_training)]
    evaluation = [evaluation_seed(0, index) for index in range(100)]
    plain_env = make_env(family, tasks=(task,))
    split = make_env(family, tasks=(task,), layouts="split")
    if family == "key-to-door":
        assert beginnings(plain_env, task, training) & beginnings(plain_env, task, evaluation)
    assert not beginnings(split, task, training) & beginnings(split, task, evaluation)
    assert len(beginnings(split, task, evaluation)) > 50


def test_split_layouts_are_an_environment_like_any_other():
    check_env(lambda: make_env("key-to-door", tasks=("one-door",), layouts="split"))


def test_an_expert_looks_into_the_environment_that_is_split():
    env = make_env("key-to-door", tasks=("one-door",), layouts="split")
    expert = make_expert(env)
    for seed in range(20):
        step = env.reset(seed=seed, task="one-door")
        expert.reset(task="one-door", seed=seed)
        while not step.is_last:
            step = env.step(expert.act(step.observation))
        assert step.success


def test_other_words_leave_the_layout_as_it_is():
    env = make_env("key-to-door", tasks=("one-door",), layouts="split")
    for seed in range(20):
        said = env.reset(seed=seed, task="one-door").observation
        silent = env.reset(seed=seed, task="one-door", instruction="").observation
        assert np.array_equal(said.proprio, silent.proprio)
        assert silent.instruction == ""


class OneLayout:
    """An environment that begins the same way whatever the seed."""

    spec = EnvSpec(
        name="one",
        proprio=(Dimension(name="x"),),
        action=(Dimension(name="a", low=-1, high=1),),
        control_hz=1.0,
        max_episode_steps=3,
    )
    tasks = ("go",)

    def reset(self, *, seed, task, instruction=None):
        return Step(observation=Observation(proprio=np.ones(1, np.float32)))

    def step(self, action):
        raise AssertionError

    def render(self, camera=None):
        raise AssertionError

    def close(self):
        pass


def test_what_cannot_be_split_is_refused():
    env, beginning = SplitLayouts(OneLayout()), OneLayout().reset(seed=0, task="go")
    mine, others = (0, evaluation_seed(0, 0))[:: -1 if is_evaluation_layout(beginning.observation.proprio) else 1]
    assert env.reset(seed=mine, task="go").observation.proprio.tolist() == [1.0]
    with pytest.raises(DataError, match="layouts='any'"):
        env.reset(seed=others, task="go")
    with pytest.raises(ConfigError, match="lengths"):
        make_env("t-maze", tasks=("length-5",), layouts="split")
    with pytest.raises(ConfigError, match="no goal to show"):
        make_env("key-to-door", tasks=("one-door",), shows_goal=True)


def test_a_preset_that_splits_layouts_builds_environments_that_do():
    config = preset("key-to-door")
    assert isinstance(build_env(config), SplitLayouts)
    plain_config = dataclasses.replace(config, env=dataclasses.replace(config.env, layouts="any"))
    assert not isinstance(build_env(plain_config), SplitLayouts)


def test_metaworld_goals_and_layouts_are_split_with_the_goal_in_sight():
    env = make_env("metaworld", tasks=("reach",), layouts="split", shows_goal=True)
    goals = [env.reset(seed=seed, task="reach").observation.proprio[36:39] for seed in (1, 2, 2**31 + 1)]
    assert all(goal.any() for goal in goals)
    assert len({goal.tobytes() for goal in goals}) == 3
    assert instruction_for("reach", 1) in phrases("reach", "training")
    hidden = make_env("metaworld", tasks=("reach",))
    assert not hidden.reset(seed=1, task="reach").observation.proprio[36:39].any()
    assert env.spec.digest != hidden.spec.digest


def test_layouts_that_only_a_camera_shows_are_split_all_the_same():
    from vla_dist.envs.metaworld import OBJECTS, MetaWorldEnv

    hidden = MetaWorldEnv(("drawer-open",), shows_objects=False)
    env = SplitLayouts(hidden, layout=hidden.full_observation)
    for seed in (1, 2, evaluation_seed(0, 0)):
        read = env.reset(seed=seed, task="drawer-open").observation.proprio
        assert not any(read[part].any() for part in OBJECTS)
        assert read[:3].any()
        assert hidden.full_observation()[OBJECTS[0]].any()
        assert is_evaluation_layout(hidden.full_observation()) == is_evaluation_seed(seed)
    assert env.spec.digest != MetaWorldEnv(("drawer-open",)).spec.digest
    for family, tasks in (("metaworld", ("drawer-open",)), ("key-to-door", ("one-door",))):
        with pytest.raises(ConfigError, match="a camera to see them"):
            make_env(family, tasks=tasks, shows_objects=False)
