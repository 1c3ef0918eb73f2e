"""What a level perceived lately, kept in each episode's state.

Shapes: B rows, F steps that a level sees at once, R < F of them before the newest, D its width.
"""

from collections.abc import Sequence

import numpy as np
import torch

from vla_dist.core.types import Array
from vla_dist.models.hierarchical.levels import Level


def nothing_recent(width: int) -> Array:
    """(0, D) of an episode that begins."""
    return frozen(np.zeros((0, width), np.float32))


def recall(level: Level, perceived: torch.Tensor, recent: Sequence[Array]) -> tuple[torch.Tensor, list[Array]]:
    """The (B, D) that a level decides on, and what each row keeps for its next step.

    Args:
        perceived: (B, D) from the level's ``perceive``.
        recent: B times (R, D), newest last.
    """
    steps = level.context_steps
    if steps == 1:
        return perceived, list(recent)
    window = np.zeros((len(recent), steps, perceived.shape[-1]), np.float32)
    window[:, -1] = perceived.float().cpu().numpy()
    for row, before in enumerate(recent):
        window[row, steps - 1 - len(before) : -1] = before
    lengths = np.array([len(before) + 1 for before in recent])
    is_step = np.arange(steps) >= steps - lengths[:, None]
    kept = [frozen(row[-min(length, steps - 1) :].copy()) for row, length in zip(window, lengths, strict=True)]
    device = perceived.device
    return level.recall(torch.from_numpy(window).to(device), torch.from_numpy(is_step).to(device)), kept


def frozen(array: Array) -> Array:
    """The same array, read-only."""
    array.flags.writeable = False
    return array
