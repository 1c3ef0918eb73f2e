import dataclasses

import numpy as np
import pytest

from vla_dist.core.errors import ConfigError
from vla_dist.core.specs import Dimension
from vla_dist.core.types import Observation
from vla_dist.envs.make import make_env
from vla_dist.rollout.behaviour import RandomActions
from vla_dist.rollout.episode import run_episode
from vla_dist.testing.fakes import make_spec

SEEN = Observation(proprio=np.zeros(5, np.float32))


def drawn(spec, seed, count):
    behaviour = RandomActions(spec)
    behaviour.begin(task="go", seed=seed)
    return [behaviour.act(SEEN) for _ in range(count)]


def test_random_actions_fill_their_bounds_and_follow_from_the_seed():
    spec = make_spec()
    spec = dataclasses.replace(spec, action=tuple(dataclasses.replace(d, low=-2.0, high=1.0) for d in spec.action))
    actions = np.stack([action for action, _ in drawn(spec, 3, 400)])
    assert actions.dtype == np.float32
    assert -2.0 <= actions.min() < -1.9
    assert 0.9 < actions.max() <= 1.0
    assert np.array_equal(actions, np.stack([action for action, _ in drawn(spec, 3, 400)]))
    assert not np.array_equal(actions[0], drawn(spec, 4, 1)[0][0])


def test_random_choices_are_one_hot_and_are_what_is_imitated():
    env = make_env("key-to-door", tasks=("one-door",))
    segments = [
        segment
        for seed in range(40)
        for segment in run_episode(
            env,
            RandomActions(env.spec),
            task="one-door",
            seed=seed,
            episode_id=f"e{seed}",
            robot_id="r",
            segment_steps=25,
        )
    ]
    actions = np.concatenate([s.actions[: s.length] for s in segments])
    assert (actions.sum(1) == 1).all()
    assert np.array_equal(actions, np.concatenate([s.target_actions[: s.length] for s in segments]))
    shares = actions.mean(0)
    assert 0.2 < shares.min() <= shares.max() < 0.3
    assert {s.source for s in segments} == {"policy"}


def test_actions_without_bounds_cannot_be_drawn():
    spec = dataclasses.replace(make_spec(), action=(Dimension(name="free"),))
    with pytest.raises(ConfigError, match="no bounds"):
        RandomActions(spec)
