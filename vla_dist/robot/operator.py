"""A person beside the robot, who may take it over: the keyboard of a terminal, or a gamepad."""

import os
import select
import struct
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vla_dist.core.errors import ConfigError, ResourceMissing
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Array, Observation
from vla_dist.robot.motion import Motion

_HOLD_S = 0.15
"""A terminal tells of key presses only, and repeats a held key: an axis goes back to rest after this."""
_MAX_NOTE = 200
"""Characters."""
_GAMEPAD = Path("/dev/input/js0")
_EVENT = struct.Struct("<IhBB")
_BUTTON, _AXIS, _INITIAL = 0x01, 0x02, 0x80


KEYS = (
    "space: take over and hand back; w s, a d, q e: move; g h: gripper; m: mark; t: type a note, Enter ends it; "
    "y: success; n: failure"
)
"""Of the keyboard, for people."""


class Operator(Protocol):
    """Asked once a step, before the action is executed."""

    name: str

    def command(self, observation: Observation) -> Array | None:
        """(A,) float32 to execute instead, or None: the policy goes on."""
        ...

    def verdict(self) -> bool | None:
        """Success or failure, once it was said; None: the robot's own word counts, the episode goes on."""
        ...

    def notes(self) -> list[str]:
        """Words for whoever looks at the episode later, said since this was last asked."""
        ...

    def reset(self) -> None:
        """Another episode begins."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Bindings:
    """What keys do: a key moves an action dimension by a share of its range."""

    axes: Mapping[str, tuple[int, float]]
    """Key -> (action dimension, -1..1 of its range)."""

    @classmethod
    def for_spec(cls, spec: EnvSpec) -> "Bindings":
        """w/s, a/d, q/e move the first three dimensions, g/h the last one."""
        pairs = ["ws", "ad", "qe", "ik", "jl", "uo"]
        axes: dict[str, tuple[int, float]] = {}
        for dimension, (up, down) in zip(range(max(1, spec.action_dim - 1)), pairs, strict=False):
            axes[up], axes[down] = (dimension, 1.0), (dimension, -1.0)
        if spec.action_dim > 1:
            axes["g"], axes["h"] = (spec.action_dim - 1, 1.0), (spec.action_dim - 1, -1.0)
        return cls(axes=axes)


class KeyboardOperator:
    """Keys of the terminal: space takes over and hands back, y and n end the episode as success or failure, m marks
    this step, t begins a note that Enter ends.

    The gripper (the last dimension) stays as it was set; the others rest when no key is held.

    Args:
        spec: of the robot.
        name: of the person, for the record.
        read_key: gives the keys pressed since it was last asked, without waiting; None reads this terminal.
        say: shows a note while it is typed.
    """

    def __init__(
        self,
        spec: EnvSpec,
        *,
        name: str,
        bindings: Bindings | None = None,
        read_key: Callable[[], str] | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.name = _named(name)
        self._motion = Motion(spec)
        self._say = say
        self._bindings = bindings or Bindings.for_spec(spec)
        self._terminal = None if read_key else Terminal()
        self._read_key = read_key or self._terminal.read  # type: ignore[union-attr]
        self._latched = {spec.action_dim - 1} if spec.action_dim > 1 else set[int]()
        self.reset()

    def reset(self) -> None:
        self._has_control = False
        self._verdict: bool | None = None
        self._values = np.zeros(self._motion.num_axes, np.float32)
        self._pressed_at = np.zeros(self._motion.num_axes)
        self._typed: str | None = None
        self._notes: list[str] = []

    def command(self, observation: Observation) -> Array | None:
        now = time.monotonic()
        for key in self._read_key():
            if self._typed is not None:
                self._type(key)
            elif key == "t":
                self._typed = ""
                self._say("\rnote: ")
            elif key == "m":
                self._notes.append("marked")
            elif key == " ":
                self._has_control = not self._has_control
            elif key in "yn":
                self._verdict = key == "y"
            elif key in self._bindings.axes:
                dimension, share = self._bindings.axes[key]
                self._values[dimension], self._pressed_at[dimension] = share, now
        if not self._has_control:
            return None
        shares = self._values.copy()
        for dimension in range(len(shares)):
            if dimension not in self._latched and now - self._pressed_at[dimension] > _HOLD_S:
                shares[dimension] = 0.0
        return self._motion.action(shares, observation)

    def verdict(self) -> bool | None:
        return self._verdict

    def notes(self) -> list[str]:
        said, self._notes = self._notes, []
        return said

    def _type(self, key: str) -> None:
        typed = self._typed or ""
        if key in "\r\n":
            self._notes += [typed] if typed else []
            self._typed = None
            self._say("\n")
        elif key in "\b\x7f":
            self._typed = typed[:-1]
            self._say("\b \b" if typed else "")
        elif len(typed) < _MAX_NOTE:
            self._typed = typed + key
            self._say(key)

    def close(self) -> None:
        """Give the terminal back."""
        if self._terminal is not None:
            self._terminal.close()


class GamepadOperator:
    """A gamepad of Linux: button 0 takes over and hands back, 1 ends as success, 2 as failure, 3 marks this step, 5
    closes the gripper.

    Stick axes 0, 1 and 4 move the first three action dimensions.

    Raises:
        ResourceMissing: no gamepad at ``device``.
    """

    axes: tuple[int, ...] = (0, 1, 4)

    def __init__(self, spec: EnvSpec, *, name: str, device: Path = _GAMEPAD) -> None:
        self.name = _named(name)
        self._motion = Motion(spec)
        try:
            self._file = os.open(device, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise ResourceMissing(
                f"no gamepad at {device} ({error.strerror}); plug one in, or use a keyboard"
            ) from error
        self._values: dict[int, float] = {}
        self._grips = False
        self.reset()

    def reset(self) -> None:
        self._has_control = False
        self._verdict: bool | None = None
        self._notes: list[str] = []

    def command(self, observation: Observation) -> Array | None:
        for kind, number, value in self._events():
            if kind == _AXIS:
                self._values[number] = value / 32767.0
            elif value and number == 0:
                self._has_control = not self._has_control
            elif value and number in (1, 2):
                self._verdict = number == 1
            elif value and number == 3:
                self._notes.append("marked")
            elif number == 5:
                self._grips = bool(value)
        if not self._has_control:
            return None
        shares = np.zeros(self._motion.num_axes, np.float32)
        for dimension, axis in zip(range(max(1, len(shares) - 1)), self.axes, strict=False):
            shares[dimension] = self._values.get(axis, 0.0)
        if len(shares) > 1:
            shares[-1] = 1.0 if self._grips else -1.0
        return self._motion.action(shares, observation)

    def verdict(self) -> bool | None:
        return self._verdict

    def notes(self) -> list[str]:
        said, self._notes = self._notes, []
        return said

    def close(self) -> None:
        os.close(self._file)

    def _events(self) -> list[tuple[int, int, int]]:
        found = []
        while True:
            try:
                data = os.read(self._file, 64 * _EVENT.size)
            except BlockingIOError:
                return found
            except OSError as error:
                raise ResourceMissing(f"the gamepad is gone ({error.strerror}); plug it in again") from error
            if not data:
                return found
            usable = len(data) - len(data) % _EVENT.size
            for _, value, kind, number in _EVENT.iter_unpack(data[:usable]):
                found.append((kind & ~_INITIAL, number, value))


class Teleoperation:
    """The actor of source human: the robot rests until the operator takes over."""

    def __init__(self, spec: EnvSpec, *, say: Callable[[str], None] = print) -> None:
        self._motion = Motion(spec)
        self._say = say

    def begin(self, *, task: str, seed: int) -> None:
        self._say(f"next: {task}")

    def act(self, observation: Observation) -> tuple[Array, None]:
        return self._motion.rest(observation), None


class Terminal:
    """Single keys of standard input, read without waiting. Ctrl-C still ends the program."""

    def __init__(self) -> None:
        if not sys.stdin.isatty():
            raise ResourceMissing("a keyboard operator needs a terminal; run this one in the foreground")
        self._before: Any = termios.tcgetattr(sys.stdin)
        self._lock = threading.Lock()
        tty.setcbreak(sys.stdin)

    def read(self) -> str:
        keys = ""
        while select.select([sys.stdin], [], [], 0)[0]:
            keys += os.read(sys.stdin.fileno(), 64).decode(errors="ignore")
        return keys

    def close(self) -> None:
        with self._lock:
            if self._before is not None:
                termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._before)
                self._before = None


def _named(name: str) -> str:
    if not name or len(name.encode()) > 64:
        raise ConfigError(f"the operator's name {name[:80]!r} must have 1 to 64 bytes: it goes into the record")
    return name
