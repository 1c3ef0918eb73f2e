"""What a robot does when no valid chunk is at hand. Judged by the robot's own monotonic clock alone."""

from collections.abc import Callable

import numpy as np

from vla_dist.core.errors import DataError
from vla_dist.core.specs import Dimension, EnvSpec
from vla_dist.core.types import ActionChunk, Array, Fallback, Observation

_POSITION_UNITS = frozenset({"m", "cm", "mm", "rad", "deg"})
_DECELERATION = 0.5
"""Share of the last command that is left after one control period of ``decelerate``."""


class DeadMan:
    """Says whether a chunk may still be executed, and what to command when it may not.

    The fallbacks, per action dimension, by its unit:

    ============  ===========================================  ==================================================
    fallback      position (m, cm, mm, rad, deg)               anything else (velocity, torque, dimensionless)
    ============  ===========================================  ==================================================
    hold          the last command                             neutral
    decelerate    the last command                             halves each period, towards neutral
    zero          the last command                             neutral
    local_policy  what the robot's own policy says; without one, hold
    ============  ===========================================  ==================================================

    Neutral is 0, or the bound nearest to 0: a dimensionless action is taken for a motion, because repeating a relative
    command moves on. A position is never zeroed: that would be a motion to the origin. Where there is no command yet,
    or where actions are discrete choices, the answer is None: command nothing, the robot stays as it is.
    """

    def __init__(self, spec: EnvSpec, *, local_policy: Callable[[Observation], Array] | None = None) -> None:
        self._is_position = np.array([_is_position(d) for d in spec.action])
        self._neutral = np.array([min(max(0.0, d.low), d.high) for d in spec.action], np.float32)
        self._is_discrete = spec.action_kind == "discrete"
        self._local_policy = local_policy

    @staticmethod
    def is_valid(chunk: ActionChunk, *, sent_at: float, now: float) -> bool:
        """Whether ``chunk`` may be executed at ``now``; both times by ``time.monotonic``, in seconds."""
        return 1000 * (now - sent_at) <= chunk.valid_for_ms

    def action(self, fallback: Fallback, *, observation: Observation, last_action: Array | None) -> Array | None:
        """(A,) float32 to command for one control period, or None to command nothing."""
        if fallback == "local_policy" and self._local_policy is not None:
            action = self._local_policy(observation)
            if action.shape != self._neutral.shape:
                raise DataError(f"the local policy gave shape {action.shape}, expected {self._neutral.shape}")
            return action
        if self._is_discrete or (last_action is None and self._is_position.any()):
            return None
        last = self._neutral if last_action is None else last_action
        motion = self._neutral
        if fallback == "decelerate":
            motion = self._neutral + np.float32(_DECELERATION) * (last - self._neutral)
        return np.where(self._is_position, last, motion).astype(np.float32)


def _is_position(dimension: Dimension) -> bool:
    return dimension.unit in _POSITION_UNITS
