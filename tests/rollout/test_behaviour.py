import dataclasses

import numpy as np
import pytest

from vla_dist.core.errors import ConfigError, DeadlineExceeded, NotFound, Unreachable
from vla_dist.core.specs import Dimension
from vla_dist.core.types import ActionChunk, Observation
from vla_dist.envs.make import make_env
from vla_dist.rollout import behaviour as behaviours
from vla_dist.rollout.behaviour import RandomActions, ServedPolicy, TooEarly
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


class Session:
    """Answers with chunks of two actions that tell its version; late as often as it is told."""

    def __init__(self, version, late=0):
        self.policy_version, self.late, self.asked, self.closed = version, late, 0, False

    def act(self, observation, *, deadline_s):
        self.asked += 1
        if self.asked <= self.late:
            raise DeadlineExceeded("no chunk in time")
        actions = np.full((2, 3), self.policy_version, np.float32)
        return ActionChunk(actions=actions, policy_version=self.policy_version, observation_id=0, valid_for_ms=1e3)

    def close(self):
        self.closed = True


def test_a_served_policy_has_a_session_and_a_version_for_each_episode_and_executes_chunks_to_their_end():
    sessions, told = [Session(4), Session(5)], []

    def open_session(task):
        told.append(task)
        return sessions[len(told) - 1]

    policy = ServedPolicy(open_session)
    policy.begin(task="open", seed=1)
    assert policy.policy_version == 4
    assert [policy.act(SEEN)[0][0] for _ in range(3)] == [4.0, 4.0, 4.0]
    assert sessions[0].asked == 2
    policy.begin(task="close", seed=2)
    assert policy.policy_version == 5
    assert policy.act(SEEN)[0][0] == 5.0, "what was left of the last episode's chunk is not executed"
    assert told == ["open", "close"]
    assert [session.closed for session in sessions] == [True, False]


def test_a_late_chunk_is_asked_for_again_and_one_that_never_comes_ends_the_episode(monkeypatch):
    late = Session(1, late=2)
    policy = ServedPolicy(lambda task: late)
    policy.begin(task="go", seed=0)
    assert policy.act(SEEN)[1] is None
    assert late.asked == 3
    monkeypatch.setattr(behaviours, "_GIVE_UP_S", 0.0)
    policy = ServedPolicy(lambda task: Session(1, late=10**9))
    policy.begin(task="go", seed=0)
    with pytest.raises(Unreachable, match="run again"):
        policy.act(SEEN)


def test_a_service_that_is_just_starting_is_waited_for():
    def open_session(task):
        raise NotFound("no application")

    with pytest.raises(Unreachable, match="not serve it yet"):
        ServedPolicy(open_session).begin(task="go", seed=0)


def test_a_served_version_that_may_not_act_yet_is_waited_out(monkeypatch):
    monkeypatch.setattr(behaviours, "_EARLY_PAUSE_S", 0.0)
    sessions = [Session(1), Session(2)]
    policy = ServedPolicy(lambda task: sessions[0] if not sessions[0].closed else sessions[1], first_version=2)
    with pytest.raises(TooEarly, match="newest version is 1, and 2 is the first that acts"):
        policy.begin(task="go", seed=0)
    policy.begin(task="go", seed=0)
    assert sessions[0].closed
    assert policy.act(SEEN)[0][0] == 2.0
