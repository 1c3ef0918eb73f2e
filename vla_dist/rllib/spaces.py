"""Between a robot's contract and the spaces of Gymnasium that RLlib works with.

Dimensions: P proprio, A action.
"""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete

from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Array


def observation_space(spec: EnvSpec) -> Box:
    """(P,) float32, with the bounds of the contract; cameras are left out."""
    return Box(
        np.array([d.low for d in spec.proprio], np.float32), np.array([d.high for d in spec.proprio], np.float32)
    )


def action_space(spec: EnvSpec) -> "gym.Space[Any]":
    """Discrete(A), or (A,) float32 with the bounds of the contract."""
    if spec.action_kind == "discrete":
        return Discrete(spec.action_dim)
    return Box(np.array([d.low for d in spec.action], np.float32), np.array([d.high for d in spec.action], np.float32))


def action_row(action: Any, space: "gym.Space[Any]") -> Array:
    """An action as an environment of this space takes it, to the (A,) float32 of the contract; a choice is one-hot."""
    if isinstance(space, Discrete):
        row = np.zeros(int(space.n), np.float32)
        row[int(action) - int(space.start)] = 1.0
        return row
    return np.array(action, np.float32)
