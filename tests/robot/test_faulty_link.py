"""The network does what networks do, at any tick: the robot stops in time, comes back by itself, and executes nothing
stale."""

import random
import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vla_dist.core.types import ActionChunk, Array, Observation
from vla_dist.robot.client import PolicyClient
from vla_dist.robot.control_loop import ControlConfig, ControlLoop
from vla_dist.robot.dead_man import DeadMan
from vla_dist.robot.reconnect_config import ReconnectConfig
from vla_dist.testing.fakes import FakeEnv, FakePolicy, make_spec
from vla_dist.testing.link import Link
from vla_dist.testing.message_link import MessageLink
from vla_dist.testing.serving import REFERENCE

HZ = 50.0
HORIZON = 5
SPEC = replace(make_spec(max_episode_steps=150), control_hz=HZ)
GRACE_S = 0.1
"""The service's default."""
STALE_S = HORIZON / HZ + GRACE_S + 2 / HZ
"""How old an observation may be whose action is executed: the chunk's time, and two periods of a noisy machine."""


class TimedEnv(FakeEnv):
    """Its observation is the moment it was made; it records how old the observation behind each action was."""

    def __init__(self) -> None:
        super().__init__(SPEC)
        self.started = time.monotonic()
        self.ages_s: list[float] = []
        self.fallbacks: list[float] = []

    def reset(self, **settings: Any) -> Any:
        return self._stamped(super().reset(**settings))

    def step(self, action: Array) -> Any:
        now = time.monotonic() - self.started
        if action[1] == 0:
            self.fallbacks.append(now)
        else:
            self.ages_s.append(now - float(action[0]))
        step = self._stamped(super().step(np.zeros(2, np.float32)))
        return replace(step, terminated=False, truncated=self._steps >= SPEC.max_episode_steps, info={})

    def _stamped(self, step: Any) -> Any:
        moment = np.zeros(SPEC.proprio_dim, np.float32)
        moment[0] = time.monotonic() - self.started
        return replace(step, observation=replace(step.observation, proprio=moment))


class EchoPolicy:
    """Every action carries the moment of its observation, and a 1 that no fallback has."""

    def __init__(self) -> None:
        self.spec = SPEC
        self.horizon = HORIZON
        self.context_steps = 1

    def initial_state(self, *, timestep: int = 0) -> int:
        return timestep

    def act(self, observations: Any, states: Any, *, generator: Any = None) -> tuple[list[Array], list[int]]:
        rows = [np.tile(np.array([o.proprio[0], 1.0], np.float32), (HORIZON, 1)) for o in observations]
        return rows, list(states)


class StandStill(DeadMan):
    """Zeros, so that a fallback can be told from every action of the policy."""

    def action(self, fallback: Any, *, observation: Observation, last_action: Array | None) -> Array:
        return np.zeros(2, np.float32)

    @staticmethod
    def is_valid(chunk: ActionChunk, *, sent_at: float, now: float) -> bool:
        return DeadMan.is_valid(chunk, sent_at=sent_at, now=now)


def drive(site: Any, trouble: Any) -> tuple[TimedEnv, Any]:
    """One episode of 3 s through a link; ``trouble(link)`` runs beside it."""
    env = TimedEnv()
    with Link(site.port) as link, PolicyClient(link.address, reconnect=ReconnectConfig(stall_s=0.3)) as client:
        thread = threading.Thread(target=trouble, args=(link,))
        config = ControlConfig(policy=REFERENCE, robot_id="r", control_hz=HZ)
        loop = ControlLoop(env, client, config, dead_man=StandStill(SPEC))
        thread.start()
        report = loop.run_episode(seed=0, task="go")
        thread.join()
    return env, report


def wait_then(*steps: tuple[float, Any]) -> Any:
    def run(link: Link) -> None:
        for pause_s, act in steps:
            time.sleep(pause_s)
            act(link)

    return run


def silent(value: bool) -> Any:
    return lambda link: setattr(link, "is_silent", value)


def refusing(link: Link) -> None:
    link.refuses = True
    link.cut()


def letting_in(link: Link) -> None:
    link.refuses = False


@pytest.mark.parametrize(
    ("trouble", "least_fallbacks"),
    [
        (wait_then((1.0, lambda link: link.cut())), 0),
        (wait_then((0.8, silent(True)), (0.7, silent(False))), 15),
        (wait_then((0.8, refusing), (0.6, letting_in)), 15),
        (wait_then((0.8, lambda link: setattr(link, "duplicate_share", 0.5)), (0.2, silent(False))), 0),
    ],
    ids=["cut", "silence", "away", "duplicates"],
)
def test_a_bad_link_stops_the_robot_and_no_more(make_site: Any, trouble: Any, least_fallbacks: int) -> None:
    env, report = drive(make_site(load=lambda artifact: EchoPolicy()), trouble)
    assert max(env.ages_s) < STALE_S, "a stale action was executed"
    assert len(env.fallbacks) >= least_fallbacks
    if least_fallbacks:
        assert len(env.ages_s) > 40, "it never came back"
        assert not report.lost


def test_a_slow_link_is_no_reason_to_execute_late_answers(make_site: Any) -> None:
    site = make_site(load=lambda artifact: EchoPolicy())
    env, _ = drive(site, wait_then((0.8, lambda link: setattr(link, "delay_s", 0.4))))
    assert max(env.ages_s) < STALE_S
    assert len(env.fallbacks) > 20, "answers that took 0.8 s were executed"


def test_messages_that_come_twice_and_late_change_no_action(make_site: Any) -> None:
    site, spec = make_site(), make_spec()
    policy, env = FakePolicy(spec, bias=float(np.float32(0.05))), FakeEnv(spec)
    state, step = policy.initial_state(), env.reset(seed=0, task="go")
    with MessageLink(f"127.0.0.1:{site.port}") as link, PolicyClient(link.address) as client:
        link.duplicate_share, link.most_delay_s = 0.5, 0.02
        with client.open_session(spec, policy=REFERENCE, robot_id="r") as session:
            while not step.is_last:
                chunk = session.act(step.observation, deadline_s=20.0)
                (expected,), (state,) = policy.act([step.observation], [state])
                assert np.array_equal(chunk.actions, expected)
                step = env.step(chunk.actions[0])
            metrics = session.metrics()
    assert link.num_doubled > 5
    assert metrics["failures"] == metrics["reconnects"] == metrics["late_answers"] == 0


def test_messages_that_never_come_cost_fallbacks_and_no_more(make_site: Any) -> None:
    site = make_site(load=lambda artifact: EchoPolicy())
    env = TimedEnv()
    reconnect = ReconnectConfig(stall_s=0.3, attempt_s=0.3)
    with (
        MessageLink(f"127.0.0.1:{site.port}") as link,
        PolicyClient(link.address, reconnect=reconnect) as client,
    ):

        def trouble() -> None:
            time.sleep(0.5)
            link.drop_share, link.duplicate_share, link.most_delay_s = 0.3, 0.2, 0.02
            time.sleep(1.5)
            link.drop_share = link.duplicate_share = link.most_delay_s = 0.0

        thread = threading.Thread(target=trouble)
        config = ControlConfig(policy=REFERENCE, robot_id="r", control_hz=HZ)
        loop = ControlLoop(env, client, config, dead_man=StandStill(SPEC))
        thread.start()
        report = loop.run_episode(seed=0, task="go")
        thread.join()
    assert link.num_dropped > 3
    assert max(env.ages_s) < STALE_S, "a stale action was executed"
    assert env.fallbacks, "messages were lost and the robot did not stop"
    assert len(env.ages_s) > 30, "it never came back"
    assert not report.lost


@pytest.mark.chaos
def test_two_hundred_troubles_of_any_kind_at_any_tick(make_site: Any) -> None:
    site, rng = make_site(load=lambda artifact: EchoPolicy()), random.Random(4)
    num_troubles, worst = 0, 0.0

    def trouble(link: Link) -> None:
        nonlocal num_troubles
        end = time.monotonic() + 2.2
        while time.monotonic() < end:
            time.sleep(rng.uniform(0.0, 0.2))
            kind = rng.randrange(4)
            num_troubles += 1
            if kind == 0:
                link.cut()
            elif kind == 1:
                link.is_silent = True
                time.sleep(rng.uniform(0.0, 0.4))
                link.is_silent = False
            elif kind == 2:
                link.delay_s = rng.choice((0.0, 0.01, 0.1, 0.3))
            else:
                refusing(link)
                time.sleep(rng.uniform(0.0, 0.3))
                letting_in(link)
        link.delay_s = 0.0

    began = time.monotonic()
    while num_troubles < 200 and time.monotonic() - began < 100:
        env, _ = drive(site, trouble)
        worst = max([worst, *env.ages_s])
    assert num_troubles >= 200
    assert worst < STALE_S, "a stale action was executed"
