"""From the -1..1 of an operator's keys and sticks to a robot's actions."""

import numpy as np

from vla_dist.core.errors import ConfigError
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Array, Observation

_STEP_SHARE = 0.02
"""Of its range that a position moves in one step with its key held: the whole of it in 50 steps."""


class Motion:
    """What a share of each action's range means on one robot.

    Most actions are movements: 0 is the middle of the range and rests. Where every action has the name of a reading, as
    with LeRobot's arms, actions are positions: 0 stays where the robot was last sent, or is, and a share moves on from
    there.

    Raises:
        ConfigError: discrete actions, or one without bounds.
    """

    def __init__(self, spec: EnvSpec) -> None:
        if spec.action_kind == "discrete":
            raise ConfigError(f"{spec.name!r} has discrete actions; an operator moves continuous ones")
        unbounded = [d.name for d in spec.action if not np.isfinite([d.low, d.high]).all()]
        if unbounded:
            raise ConfigError(
                f"an operator moves a share of each action's range, and {', '.join(unbounded[:6])} of {spec.name!r} "
                "has none; give the driver bounds (lerobot: bounds=LOW:HIGH)"
            )
        self._low = np.array([d.low for d in spec.action], np.float32)
        self._high = np.array([d.high for d in spec.action], np.float32)
        readings = [d.name for d in spec.proprio]
        is_placed = all(d.name in readings for d in spec.action)
        self._readings = [readings.index(d.name) for d in spec.action] if is_placed else None

    @property
    def num_axes(self) -> int:
        return len(self._low)

    def action(self, shares: Array, observation: Observation) -> Array:
        """(A,) shares within -1..1 to the (A,) float32 action, within bounds."""
        shares = np.clip(shares, -1.0, 1.0)
        middle, half = (self._low + self._high) / 2, (self._high - self._low) / 2
        if self._readings is None:
            return (middle + half * shares).astype(np.float32)
        sent = observation.previous_action
        start = observation.proprio[self._readings] if sent is None else sent
        return np.clip(start + 2 * half * _STEP_SHARE * shares, self._low, self._high).astype(np.float32)

    def rest(self, observation: Observation) -> Array:
        """(A,) float32, the action of nobody's hand."""
        return self.action(np.zeros(self.num_axes, np.float32), observation)
