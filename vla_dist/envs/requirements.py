"""What environments and experts of several kinds refuse in the same words."""

from collections.abc import Sequence

import numpy as np

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.core.types import Array


def one_hot_choice(action: Array, num_actions: int) -> Array:
    """(A,) float32, one-hot of the largest of (A,) scores: the action that is executed.

    Raises:
        DataError: another shape, or a number that is not finite.
    """
    scores = np.asarray(action, np.float32)
    if scores.shape != (num_actions,) or not np.isfinite(scores).all():
        raise DataError(f"action {action!r} must be {num_actions} finite numbers; the largest one acts")
    return np.eye(num_actions, dtype=np.float32)[scores.argmax()]


def require_task(task: str, tasks: Sequence[str]) -> None:
    """Raises ConfigError where an expert is asked for a task that its environment lacks."""
    if task not in tasks:
        raise ConfigError(f"expert for {task!r}, but its environment has {', '.join(tasks)}")
