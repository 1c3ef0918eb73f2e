"""What is commanded when there is nothing valid to command."""

from dataclasses import replace

import numpy as np
import pytest

from vla_dist.core.errors import DataError
from vla_dist.core.specs import Dimension
from vla_dist.core.types import ActionChunk, Fallback, Observation
from vla_dist.robot.dead_man import DeadMan
from vla_dist.testing.fakes import make_spec

SPEC = replace(
    make_spec(),
    action=(
        Dimension(name="joint", unit="rad", low=-3.0, high=3.0),
        Dimension(name="wheel", unit="m/s", low=-1.0, high=1.0),
        Dimension(name="throttle", low=0.2, high=1.0),
        Dimension(name="dx", low=-1.0, high=1.0),
    ),
)
LAST = np.array([1.5, 0.8, 1.0, -0.6], np.float32)
OBSERVATION = Observation(proprio=np.zeros(5, np.float32))


@pytest.mark.parametrize(
    ("fallback", "expected"),
    [
        ("hold", [1.5, 0.0, 0.2, 0.0]),
        ("zero", [1.5, 0.0, 0.2, 0.0]),
        ("decelerate", [1.5, 0.4, 0.6, -0.3]),
        ("local_policy", [1.5, 0.0, 0.2, 0.0]),
    ],
)
def test_positions_stay_and_motions_end(fallback: Fallback, expected: list[float]) -> None:
    action = DeadMan(SPEC).action(fallback, observation=OBSERVATION, last_action=LAST)
    assert action == pytest.approx(expected)


def test_deceleration_comes_to_rest() -> None:
    dead_man, action = DeadMan(SPEC), LAST
    for _ in range(20):
        after = dead_man.action("decelerate", observation=OBSERVATION, last_action=action)
        assert after is not None
        action = after
    assert action == pytest.approx([1.5, 0.0, 0.2, 0.0], abs=1e-4)


def test_without_a_command_yet_a_position_is_not_invented() -> None:
    assert DeadMan(SPEC).action("hold", observation=OBSERVATION, last_action=None) is None
    rates = replace(SPEC, action=SPEC.action[1:])
    assert DeadMan(rates).action("hold", observation=OBSERVATION, last_action=None) == pytest.approx([0.0, 0.2, 0.0])


def test_a_choice_cannot_be_held() -> None:
    discrete = replace(make_spec(), action_kind="discrete")
    assert DeadMan(discrete).action("zero", observation=OBSERVATION, last_action=np.ones(2, np.float32)) is None


def test_the_robots_own_policy_is_asked() -> None:
    dead_man = DeadMan(SPEC, local_policy=lambda observation: np.full(4, 0.3, np.float32))
    action = dead_man.action("local_policy", observation=OBSERVATION, last_action=LAST)
    assert action == pytest.approx([0.3] * 4)
    assert dead_man.action("hold", observation=OBSERVATION, last_action=LAST) == pytest.approx([1.5, 0.0, 0.2, 0.0])
    wrong = DeadMan(SPEC, local_policy=lambda observation: np.zeros(3, np.float32))
    with pytest.raises(DataError, match=r"shape \(3,\), expected \(4,\)"):
        wrong.action("local_policy", observation=OBSERVATION, last_action=LAST)


def test_validity_counts_from_the_sending() -> None:
    chunk = ActionChunk(actions=np.zeros((1, 4), np.float32), policy_version=1, observation_id=0, valid_for_ms=200)
    assert DeadMan.is_valid(chunk, sent_at=10.0, now=10.1999)
    assert not DeadMan.is_valid(chunk, sent_at=10.0, now=10.2001)
