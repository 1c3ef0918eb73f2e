"""A simulated arm behind LeRobot's Robot interface is a robot like any other."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from vla_dist.core.errors import ConfigError, DataError, ResourceMissing, Unreachable
from vla_dist.robot.lerobot_robot import LeRobotRobot, build_lerobot
from vla_dist.testing.env_contract import check_env

JOINTS = ("shoulder.pos", "elbow.pos")


class SimulatedArm:
    """Two joints that go where they are told, slowly, and a camera; as lerobot's own robots look."""

    name = "simulated_arm"

    def __init__(self) -> None:
        self.is_connected = False
        self.joints = dict.fromkeys(JOINTS, 0.0)
        self.camera_works = True
        self.breaks = False

    @property
    def observation_features(self) -> dict[str, Any]:
        return {**dict.fromkeys(JOINTS, float), "wrist": (12, 16, 3)}

    @property
    def action_features(self) -> dict[str, Any]:
        return dict.fromkeys(JOINTS, float)

    def connect(self) -> None:
        self.is_connected = True

    def get_observation(self) -> Mapping[str, Any]:
        if self.breaks:
            raise OSError("no such port")
        frame = np.full((12, 16, 3), int(abs(self.joints["elbow.pos"])) % 256, np.uint8)
        return {**self.joints, "wrist": frame if self.camera_works else None}

    def send_action(self, action: dict[str, float]) -> Mapping[str, Any]:
        sent = {name: float(np.clip(value, -80, 80)) for name, value in action.items()}
        for name, goal in sent.items():
            self.joints[name] += 0.5 * (goal - self.joints[name])
        return sent

    def disconnect(self) -> None:
        self.is_connected = False


def make_robot(arm: SimulatedArm | None = None, **settings: Any) -> LeRobotRobot:
    bounds = dict.fromkeys(JOINTS, (-90.0, 90.0))
    options = {"tasks": ("reach",), "control_hz": 30.0, "max_episode_steps": 15, "action_bounds": bounds}
    return LeRobotRobot(arm or SimulatedArm(), **{**options, **settings})


class Homed(LeRobotRobot):
    """With a scene that is the same after every reset but for the seed, as the contract suite wants it."""

    def reset(self, *, seed: int, task: str, instruction: str | None = None):  # type: ignore[no-untyped-def]
        self._robot.joints = dict.fromkeys(JOINTS, float(seed))  # type: ignore[attr-defined]
        return super().reset(seed=seed, task=task, instruction=instruction)


def test_it_keeps_the_contract_of_every_robot() -> None:
    bounds = dict.fromkeys(JOINTS, (-70.0, 70.0))
    check_env(
        lambda: Homed(SimulatedArm(), tasks=("reach",), control_hz=30.0, max_episode_steps=15, action_bounds=bounds)
    )


def test_its_spec_follows_from_its_features() -> None:
    spec = make_robot().spec
    assert [d.name for d in spec.proprio] == list(JOINTS)
    assert [(c.name, c.height, c.width) for c in spec.cameras] == [("wrist", 12, 16)]
    assert spec.action[0].high == 90.0


def test_what_was_truly_sent_is_what_is_recorded() -> None:
    robot = make_robot()
    robot.reset(seed=0, task="reach")
    step = robot.step(np.array([85.0, 200.0], np.float32))
    assert step.observation.previous_action.tolist() == [80.0, 80.0]
    robot.close()


def test_a_judge_ends_the_episode() -> None:
    robot = make_robot(judge=lambda seen: bool(seen.proprio[0] > 30))
    robot.reset(seed=0, task="reach", instruction="reach out")
    steps = [robot.step(np.array([50.0, 0.0], np.float32)) for _ in range(2)]
    assert [(one.terminated, one.success) for one in steps] == [(False, False), (True, True)]
    with pytest.raises(RuntimeError, match="call reset"):
        robot.step(np.zeros(2, np.float32))


def test_bounds_are_said_for_all_actions_or_for_one() -> None:
    options = {"factory": f"{__name__}:SimulatedArm", "bounds": "-100:100", "bounds.elbow.pos": "0:45"}
    spec = build_lerobot(options, tasks=("reach",), max_episode_steps=5).spec
    assert [(one.low, one.high) for one in spec.action] == [(-100.0, 100.0), (0.0, 45.0)]


def test_faults_of_the_hardware_are_named() -> None:
    arm = SimulatedArm()
    robot = make_robot(arm)
    arm.camera_works = False
    assert robot.reset(seed=0, task="reach").observation.images == {}
    arm.breaks = True
    with pytest.raises(Unreachable, match=r"no such port.*check its cables"):
        robot.step(np.zeros(2, np.float32))
    arm.breaks = False
    del arm.joints["elbow.pos"]
    arm.get_observation = lambda: arm.joints  # type: ignore[method-assign]
    with pytest.raises(DataError, match=r"gave no elbow\.pos"):
        robot.reset(seed=0, task="reach")


def test_what_cannot_work_is_said() -> None:
    with pytest.raises(ConfigError, match="at least one task"):
        make_robot(tasks=())
    with pytest.raises(ConfigError, match="name \\['wrist_roll'\\]"):
        make_robot(action_bounds={"wrist_roll": (0.0, 1.0)})
    with pytest.raises(ConfigError, match="needs factory=MODULE:FUNCTION"):
        build_lerobot({}, tasks=("reach",), max_episode_steps=5)
    with pytest.raises(ConfigError, match="must be written LOW:HIGH"):
        build_lerobot({"factory": f"{__name__}:SimulatedArm", "bounds": "90"}, tasks=("reach",), max_episode_steps=5)
    with pytest.raises(ConfigError, match="the first must be below the second"):
        build_lerobot({"factory": f"{__name__}:SimulatedArm", "bounds": "9:-9"}, tasks=("reach",), max_episode_steps=5)
    with pytest.raises(ResourceMissing, match="cannot be imported"):
        build_lerobot({"factory": "no_such_module:make"}, tasks=("reach",), max_episode_steps=5)
