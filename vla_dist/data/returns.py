"""Sums of rewards, computed when sampled so that stored rewards stay raw.

Source: Chen et al. 2021, "Decision Transformer", section 3 (returns-to-go, undiscounted).
"""

import numpy as np

from vla_dist.core.errors import DataError
from vla_dist.core.types import Array


def returns_to_go(rewards: Array, *, lengths: Array | None = None, tail_returns: Array | None = None) -> Array:
    """Sum of the rewards from each step, itself included, to the end of the episode.

    Args:
        rewards: (..., T) raw rewards; any leading dimensions.
        lengths: (...,) valid steps of each row; the rest is padding and counts as zero. None: all are valid.
        tail_returns: (...,) reward that the episode still collects after the row's last step. None: zero.

    Returns:
        (..., T) float64; summed in float64 so that long episodes keep their small rewards. Padded steps hold 0.

    Raises:
        DataError: a length outside 0..T.
    """
    rewards = np.asarray(rewards, np.float64)
    num_steps = rewards.shape[-1]
    valid = np.ones(rewards.shape, bool)
    if lengths is not None:
        lengths = np.asarray(lengths)
        if ((lengths < 0) | (lengths > num_steps)).any():
            raise DataError(f"lengths within {lengths.min()}..{lengths.max()} must be within 0..{num_steps}")
        valid = np.arange(num_steps) < lengths[..., None]
    suffix = np.flip(np.cumsum(np.flip(np.where(valid, rewards, 0.0), -1), -1), -1)
    if tail_returns is not None:
        suffix = suffix + np.asarray(tail_returns, np.float64)[..., None]
    return np.where(valid, suffix, 0.0)
