"""What a robot offers and a policy expects: the contract compared before any motion."""

import hashlib
import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, cast

from vla_dist.core.errors import ConfigError, ContractMismatch

ActionKind = Literal["continuous", "discrete"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimension:
    """One scalar of a vector: a joint reading, a coordinate, a command."""

    name: str
    """For example ``gripper_x``; unique within its vector."""
    unit: str = "1"
    """SI unit or ``1`` for a dimensionless number: ``m``, ``rad``, ``rad/s``."""
    low: float = -math.inf
    """Smallest value, inclusive."""
    high: float = math.inf
    """Largest value, inclusive."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("a dimension has no name; give each one a unique name")
        if not self.low < self.high:
            raise ConfigError(f"dimension {self.name!r}: low {self.low} must be below high {self.high}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CameraSpec:
    """One camera: frames are (height, width, 3) uint8, RGB, top row first."""

    name: str
    height: int
    width: int

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ConfigError(f"camera {self.name!r}: size {self.height}x{self.width} must be at least 1x1")


@dataclass(frozen=True, kw_only=True)
class EnvSpec:
    """The contract of a robot or simulator.

    Two specs fit when everything but the name is equal; ``require_match`` lists every difference in one sentence.
    """

    name: str
    """Human-readable; not part of the contract."""
    proprio: tuple[Dimension, ...]
    """P dimensions of ``Observation.proprio``."""
    action: tuple[Dimension, ...]
    """A dimensions of an action. Discrete actions are one-hot over A choices."""
    control_hz: float
    """Actions executed per second."""
    max_episode_steps: int
    """An episode is truncated after this many steps."""
    cameras: tuple[CameraSpec, ...] = ()
    action_kind: ActionKind = "continuous"
    normalisation_hash: str = ""
    """Empty: raw values travel and the policy normalises them itself."""

    def __post_init__(self) -> None:
        for label, names in (
            ("proprio", [d.name for d in self.proprio]),
            ("action", [d.name for d in self.action]),
            ("camera", [c.name for c in self.cameras]),
        ):
            twice = sorted(name for name, count in Counter(names).items() if count > 1)
            if twice:
                raise ConfigError(f"spec {self.name!r}: {label} names {twice} appear twice; make them unique")
        if not self.action:
            raise ConfigError(f"spec {self.name!r} has no action dimension; at least one is needed")
        if self.control_hz <= 0:
            raise ConfigError(f"spec {self.name!r}: control_hz {self.control_hz} must be positive")
        if self.max_episode_steps < 1:
            raise ConfigError(f"spec {self.name!r}: max_episode_steps {self.max_episode_steps} must be at least 1")
        if self.action_kind not in ("continuous", "discrete"):
            raise ConfigError(
                f"spec {self.name!r}: action_kind {self.action_kind!r} must be 'continuous' or 'discrete'"
            )

    @property
    def proprio_dim(self) -> int:
        return len(self.proprio)

    @property
    def action_dim(self) -> int:
        return len(self.action)

    def contract(self) -> dict[str, Any]:
        """The part that must agree, as plain JSON values."""
        fields = asdict(self)
        del fields["name"]
        return _finite(fields)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON of the contract, 64 hexadecimal digits."""
        # A service is asked for it at each session. Kept, which a class with slots could not.
        text = json.dumps(self.contract(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps({"name": self.name, **self.contract()}, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "EnvSpec":
        """Inverse of ``to_json``. Raises ConfigError on anything else."""
        try:
            fields = json.loads(text)
            return cls(
                name=fields["name"],
                proprio=tuple(_dimension(d) for d in fields["proprio"]),
                action=tuple(_dimension(d) for d in fields["action"]),
                control_hz=float(fields["control_hz"]),
                max_episode_steps=int(fields["max_episode_steps"]),
                cameras=tuple(CameraSpec(**c) for c in fields["cameras"]),
                action_kind=fields["action_kind"],
                normalisation_hash=fields["normalisation_hash"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"not the JSON of an EnvSpec ({error!r}); write it with EnvSpec.to_json()") from error

    def differences(self, other: "EnvSpec") -> list[str]:
        """Every way in which ``other`` differs, one clause each; empty when they fit."""
        if self._agreed() == other._agreed():
            return []
        found: list[str] = []
        mine, theirs = self.contract(), other.contract()
        for key in ("control_hz", "max_episode_steps", "action_kind", "normalisation_hash"):
            if mine[key] != theirs[key]:
                found.append(f"{key} {mine[key]!r} against {theirs[key]!r}")
        for key in ("proprio", "action", "cameras"):
            found += _list_differences(key, mine[key], theirs[key])
        return found

    def _agreed(self) -> tuple[Any, ...]:
        """What the contract is made of: a service compares it at each session, so not by way of JSON."""
        numbers = (self.control_hz, self.max_episode_steps, self.action_kind, self.normalisation_hash)
        return (*numbers, self.proprio, self.action, self.cameras)

    def require_match(self, other: "EnvSpec", *, mine: str = "policy", theirs: str = "robot") -> None:
        """Raise ContractMismatch naming every difference, if there is one."""
        found = self.differences(other)
        if found:
            raise ContractMismatch(
                f"the {mine}'s contract ({self.name}) differs from the {theirs}'s ({other.name}): "
                + "; ".join(found)
                + f". Serve this {theirs} a policy trained for its spec, or change the {theirs}'s spec."
            )


def _dimension(fields: dict[str, Any]) -> Dimension:
    low, high = fields["low"], fields["high"]
    return Dimension(
        name=fields["name"],
        unit=fields["unit"],
        low=-math.inf if low is None else low,
        high=math.inf if high is None else high,
    )


def _finite(value: Any) -> Any:
    """JSON has no infinity: None stands for an open bound."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in cast("dict[str, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in cast("list[Any]", value)]
    return None if isinstance(value, float) and math.isinf(value) else value


def _list_differences(key: str, mine: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[str]:
    if len(mine) != len(theirs):
        return [f"{key} has {len(mine)} entries against {len(theirs)}"]
    found: list[str] = []
    for index, (left, right) in enumerate(zip(mine, theirs, strict=True)):
        found += [
            f"{key}[{index}].{field} {left[field]!r} against {right[field]!r}"
            for field in left
            if left[field] != right[field]
        ]
    return found
