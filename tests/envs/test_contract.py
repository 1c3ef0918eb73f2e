"""Every environment of the room keeps the contract, and the contract suite can fail."""

from dataclasses import replace

import numpy as np
import pytest

from vla_dist.core.protocols import RobotEnv
from vla_dist.core.specs import CameraSpec
from vla_dist.core.types import Observation, Step
from vla_dist.envs.gl import find_gl
from vla_dist.envs.make import make_env
from vla_dist.testing.env_contract import check_env
from vla_dist.testing.fakes import FakeEnv, make_spec

CASES = {
    "metaworld drawer-open": ("metaworld", ("drawer-open", "window-close"), ()),
    "metaworld button-press-topdown": ("metaworld", ("button-press-topdown",), ()),
    "metaworld scene": ("metaworld", ("scene/drawer-close", "scene/drawer-open"), ()),
    "babyai": ("babyai", ("GoToLocal", "PickupLoc"), ()),
    "babyai with a camera": ("babyai", ("PutNextLocal",), (CameraSpec(name="view", height=56, width=56),)),
    "t-maze": ("t-maze", ("length-5-20", "length-7"), ()),
    "key-to-door": ("key-to-door", ("one-door",), ()),
    "key-to-door with two doors": ("key-to-door", ("matching-door",), ()),
    "gymnasium continuous": ("gymnasium:Pendulum-v1", (), ()),
    "gymnasium discrete": ("gymnasium:CartPole-v1", (), ()),
    "gymnasium mujoco": ("gymnasium:Hopper-v5", (), ()),
}


@pytest.mark.parametrize("case", CASES)
def test_environment_keeps_the_contract(case: str) -> None:
    name, tasks, cameras = CASES[case]
    check_env(lambda: make_env(name, tasks=tasks, cameras=cameras, max_episode_steps=30))


def test_a_fake_without_a_fault_keeps_the_contract() -> None:
    check_env(lambda: _Broken("none"))


@pytest.mark.gl
def test_tabletop_with_cameras_keeps_the_contract() -> None:
    if find_gl() is None:
        pytest.skip("this machine cannot draw")
    cameras = (CameraSpec(name="table", height=84, width=84), CameraSpec(name="gripperPOV", height=64, width=96))
    check_env(lambda: make_env("metaworld", tasks=("scene/drawer-open",), cameras=cameras, max_episode_steps=10))


class _Broken(FakeEnv):
    """A fake that keeps the contract but for one promise."""

    def __init__(self, fault: str) -> None:
        super().__init__(make_spec(max_episode_steps=12))
        self.fault = fault
        self.started = False

    def reset(self, *, seed: int, task: str, instruction: str | None = None) -> Step:
        self.started = True
        words = "always the same" if self.fault == "words" else instruction
        return super().reset(seed=0 if self.fault == "seed" else seed, task=task, instruction=words)

    def step(self, action: np.ndarray) -> Step:
        if self.fault == "start" and not self.started:
            return Step(observation=Observation(proprio=np.zeros(5, np.float32)))
        if self.fault == "auto-reset" and self.started and self._steps >= self.spec.max_episode_steps:
            return self.reset(seed=0, task="go")
        if self.fault != "clip" and action.shape == (self.spec.action_dim,):
            action = np.clip(action, -1, 1)
        step = super().step(action)
        if self.fault == "dtype":
            wide = replace(step.observation, proprio=step.observation.proprio.astype(np.float64))
            return replace(step, observation=wide)
        return step


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("seed", "seed is ignored"),
        ("words", "asked for"),
        ("start", "before the first reset"),
        ("auto-reset", "after the end"),
        ("clip", "not clipped"),
        ("dtype", "expected float32"),
    ],
)
def test_contract_suite_names_each_fault(fault: str, complaint: str) -> None:
    def build() -> RobotEnv:
        return _Broken(fault)

    with pytest.raises(AssertionError, match=complaint):
        check_env(build)
