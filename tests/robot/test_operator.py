"""Keys and sticks become actions within bounds; a person takes over, hands back and says how it went."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from vla_dist.core.errors import ConfigError, ResourceMissing
from vla_dist.core.specs import Dimension
from vla_dist.core.types import Observation
from vla_dist.robot.operator import GamepadOperator, KeyboardOperator, Teleoperation
from vla_dist.testing.fakes import make_spec

SPEC = make_spec(action_dim=4)
SEEN = Observation(proprio=np.zeros(5, np.float32))


def keyboard(*presses: str, spec=SPEC) -> KeyboardOperator:  # type: ignore[no-untyped-def]
    waiting = list(presses)
    return KeyboardOperator(spec, name="anna", read_key=lambda: waiting.pop(0) if waiting else "")


def test_a_key_takes_over_moves_and_hands_back() -> None:
    operator = keyboard("w", " ", "wg", "", " ")
    assert operator.command(SEEN) is None
    assert operator.command(SEEN)[0] == 1.0, "the key was still fresh"
    assert operator.command(SEEN).tolist() == [1.0, 0.0, 0.0, 1.0]
    assert operator.command(SEEN)[3] == 1.0, "the gripper stays"
    assert operator.command(SEEN) is None


def test_an_axis_rests_when_its_key_is_released() -> None:
    operator = keyboard(" w")
    assert operator.command(SEEN)[0] == 1.0
    operator._pressed_at -= 1.0
    assert operator.command(SEEN)[0] == 0.0


def test_actions_stay_within_bounds() -> None:
    action = (Dimension(name="x", low=2.0, high=6.0), Dimension(name="grip", low=0.0, high=1.0))
    spec = type(SPEC)(name="x", proprio=(), action=action, control_hz=10, max_episode_steps=5)
    assert keyboard(" s", spec=spec).command(SEEN).tolist() == [2.0, 0.5]
    assert Teleoperation(spec, say=lambda _: None).act(SEEN)[0].tolist() == [4.0, 0.5]


def test_where_actions_are_positions_a_takeover_does_not_move_the_arm() -> None:
    """The middle of its range was commanded, whatever the arm did just then."""
    joints = tuple(Dimension(name=name, low=-100.0, high=100.0) for name in ("elbow.pos", "grip.pos"))
    spec = type(SPEC)(name="x", proprio=joints, action=joints, control_hz=10, max_episode_steps=5)
    seen = Observation(proprio=np.array([60.0, -20.0], np.float32))
    operator = keyboard(" ", "w", "g", spec=spec)
    assert operator.command(seen).tolist() == [60.0, -20.0]
    assert operator.command(seen).tolist() == [64.0, -20.0]
    operator._pressed_at -= 1.0
    sent = Observation(proprio=seen.proprio, previous_action=np.array([64.0, 99.0], np.float32))
    assert operator.command(sent).tolist() == [64.0, 100.0], "from where it was sent, within bounds"
    assert Teleoperation(spec, say=lambda _: None).act(seen)[0].tolist() == [60.0, -20.0]


def test_a_note_is_typed_without_moving_anything() -> None:
    shown: list[str] = []
    waiting = [" m", "t", "dry\x7fawn", "y g\n", "y"]
    operator = KeyboardOperator(SPEC, name="anna", read_key=lambda: waiting.pop(0), say=shown.append)
    assert operator.command(SEEN) is not None
    assert operator.notes() == ["marked"]
    for _ in range(3):
        assert operator.command(SEEN).tolist() == [0.0] * 4
        assert operator.verdict() is None
    assert operator.notes() == ["drawny g"]
    assert operator.notes() == []
    operator.command(SEEN)
    assert operator.verdict() is True
    assert "".join(shown) == "\rnote: dry\b \bawny g\n"


def test_a_verdict_holds_until_the_next_episode() -> None:
    operator = keyboard("y")
    operator.command(SEEN)
    assert operator.verdict() is True
    operator.reset()
    assert operator.verdict() is None


def test_a_gamepad_is_read_from_its_device(tmp_path: Path) -> None:
    device = tmp_path / "js0"
    os.mkfifo(device)
    operator = None
    reader = os.open(device, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(device, os.O_WRONLY | os.O_NONBLOCK)
    try:
        operator = GamepadOperator(SPEC, name="anna", device=device)

        def press(kind: int, number: int, value: int) -> None:
            os.write(writer, struct.pack("<IhBB", 0, value, kind, number))

        press(2, 0, -32767)
        assert operator.command(SEEN) is None
        press(1, 0, 1)
        press(1, 5, 1)
        assert operator.command(SEEN).tolist() == [-1.0, 0.0, 0.0, 1.0]
        press(1, 3, 1)
        press(1, 2, 1)
        operator.command(SEEN)
        assert operator.verdict() is False
        assert operator.notes() == ["marked"]
    finally:
        if operator is not None:
            operator.close()
        os.close(writer)
        os.close(reader)


def test_what_cannot_work_is_said(tmp_path: Path) -> None:
    with pytest.raises(ResourceMissing, match="no gamepad at"):
        GamepadOperator(SPEC, name="anna", device=tmp_path / "none")
    action = (Dimension(name="elbow.pos"),)
    spec = type(SPEC)(name="arm", proprio=(), action=action, control_hz=10, max_episode_steps=5)
    with pytest.raises(ConfigError, match=r"elbow\.pos of 'arm' has none; give the driver bounds"):
        keyboard(spec=spec)
    with pytest.raises(ConfigError, match="name '' must have 1 to 64"):
        KeyboardOperator(SPEC, name="", read_key=lambda: "")
    with pytest.raises(ResourceMissing, match="needs a terminal"):
        KeyboardOperator(SPEC, name="anna")
