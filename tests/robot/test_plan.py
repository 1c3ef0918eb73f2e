"""Real-time chunks over a slow network: the robot neither stops nor jerks where one chunk joins the next."""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vla_dist.core.errors import ConfigError
from vla_dist.core.types import Array, Step
from vla_dist.robot.client import PolicyClient
from vla_dist.robot.control_loop import ControlConfig, ControlLoop
from vla_dist.robot.plan import PlanAhead
from vla_dist.testing.fakes import FakeEnv, make_spec
from vla_dist.testing.link import Link
from vla_dist.testing.serving import REFERENCE

HORIZON = 48
HZ = 40.0
SPEC = replace(make_spec(max_episode_steps=120), control_hz=HZ)
JITTER = 0.3
"""How far two chunks disagree: a policy that could as well pass on the left as on the right."""


class WaveEnv(FakeEnv):
    """Its first proprio is the step of the episode, so that a policy knows the time; nothing ends it early."""

    def reset(self, *, seed: int, task: str, instruction: str | None = None) -> Step:
        step = super().reset(seed=seed, task=task, instruction=instruction)
        return replace(step, observation=replace(step.observation, proprio=np.zeros(self.spec.proprio_dim, np.float32)))

    def step(self, action: Array) -> Step:
        step = super().step(action)
        now = np.full(self.spec.proprio_dim, self._steps / 1000, np.float32)
        observation = replace(step.observation, proprio=now)
        return replace(
            step,
            observation=observation,
            terminated=False,
            truncated=self._steps >= self.spec.max_episode_steps,
            info={},
        )


class UndecidedPolicy:
    """A smooth path plus an offset that each chunk draws anew."""

    def __init__(self) -> None:
        self.spec = SPEC
        self.horizon = HORIZON
        self.context_steps = 1
        self._random = np.random.default_rng(5)

    def initial_state(self, *, timestep: int = 0) -> int:
        return timestep

    def act(self, observations: Any, states: Any, *, generator: Any = None) -> tuple[list[Array], list[int]]:
        chunks = []
        for observation in observations:
            rows = float(observation.proprio[0]) * 1000 + np.arange(HORIZON)
            wave = 0.5 * np.sin(2 * np.pi * rows / 60) + self._random.choice([-1, 1]) * JITTER / 2
            chunks.append(np.repeat(wave[:, None], SPEC.action_dim, 1).astype(np.float32))
        return chunks, list(states)


def drive(site: Any, delay_s: float, execution: Any) -> tuple[Array, Any]:
    """The executed actions (T,), and the report."""
    executed: list[Array] = []
    env = WaveEnv(SPEC)
    step = env.step
    env.step = lambda action: (executed.append(action), step(action))[1]  # type: ignore[method-assign]
    with Link(site.port) as link, PolicyClient(link.address) as client:
        link.delay_s = delay_s / 2
        config = ControlConfig(policy=REFERENCE, robot_id="r", control_hz=HZ, execution=execution)
        report = ControlLoop(env, client, config).run_episode(seed=0, task="go")
    return np.array(executed)[:, 0], report


@pytest.mark.parametrize("delay_s", [0.0, 0.1, 0.4])
def test_seams_are_smooth_whatever_the_delay(make_site: Any, delay_s: float) -> None:
    site = make_site(load=lambda artifact: UndecidedPolicy())
    actions, report = drive(site, delay_s, "real_time")
    waits = int(HZ * delay_s) + 4  # nothing can be executed before the first answer
    steady = actions[waits:]
    within = 0.5 * 2 * np.pi / 60
    assert np.abs(np.diff(steady)).max() < within + 0.6 * JITTER, "a seam jumps as if nothing joined it"
    assert np.abs(np.diff(steady)).mean() < 2 * within
    assert report.num_fallbacks <= waits
    assert not report.lost


def test_the_plan_goes_along_and_comes_back_as_the_first_rows(make_site: Any) -> None:
    site = make_site(load=lambda artifact: UndecidedPolicy())
    with (
        PolicyClient(f"127.0.0.1:{site.port}") as client,
        client.open_session(SPEC, policy=REFERENCE, robot_id="r") as session,
    ):
        ahead = PlanAhead(session, period_s=1 / HZ, execute_steps=5)
        env = WaveEnv(SPEC)
        step = env.reset(seed=0, task="go")
        plan = None
        deadline = time.monotonic() + 5
        while plan is None and time.monotonic() < deadline:
            plan = ahead.follow(plan, step.observation)
        assert plan is not None
        first = plan
        while plan is first and time.monotonic() < deadline:
            before = first.chunk.actions[first.next_index :]
            plan = ahead.follow(plan, step.observation)
            if plan is first and not plan.is_used_up:
                step = env.step(plan.take())
                time.sleep(1 / HZ)
        assert plan is not first
        # The row that is due now continues the row that was due before, mixed but never the raw new opinion.
        assert plan is not None
        assert abs(plan.chunk.actions[plan.next_index, 0] - before[0, 0]) < 0.35 * JITTER
        ahead.close()


def test_a_policy_of_single_steps_cannot_be_joined(site: Any, client: PolicyClient) -> None:
    with (
        client.open_session(make_spec(), policy=REFERENCE, robot_id="r") as session,
        pytest.raises(ConfigError, match="needs chunks of 2 actions or more"),
    ):
        PlanAhead(session, period_s=0.1)
    with pytest.raises(ConfigError, match="does not wait"):
        ControlConfig(policy=REFERENCE, robot_id="r", control_hz=None, execution="real_time")
