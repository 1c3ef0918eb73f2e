"""Layouts that training and evaluation cannot share."""

import hashlib
from collections.abc import Callable

import numpy as np

from vla_dist.core.errors import DataError
from vla_dist.core.protocols import RobotEnv
from vla_dist.core.seeding import is_evaluation_seed, redrawn_seed
from vla_dist.core.types import Array, Step

_CELL = 0.02
"""Readings that differ by less are one: 2 cm, where a reading is in metres."""
_MAX_DRAWS = 64


class SplitLayouts:
    """An environment whose episodes begin in one half of all layouts with a training seed, in the other otherwise.

    Different seeds may lay out the same scene, in a small world they often do. Here what the robot reads at first,
    rounded to cells, belongs to training or to evaluation by its hash, and a seed whose layout is of the other half
    draws again. So whatever the seeds are, no evaluation episode begins as a training episode may have begun.

    The words take no part in it, so that an episode with wrong words has the layout of that with the right ones.
    """

    def __init__(self, env: RobotEnv, *, layout: Callable[[], Array] | None = None) -> None:
        """``layout``: what tells where everything is after a reset, in metres; None: what the robot reads, where that
        tells it."""
        self._layout = layout
        self.inner = env
        """What an expert looks into."""
        self.spec = env.spec
        self.tasks = env.tasks

    def reset(self, *, seed: int, task: str, instruction: str | None = None) -> Step:
        """Raises DataError where the environment has next to no layouts to split."""
        for draw in range(_MAX_DRAWS):
            step = self.inner.reset(seed=redrawn_seed(seed, draw), task=task, instruction=instruction)
            layout = step.observation.proprio if self._layout is None else self._layout()
            if is_evaluation_layout(layout) == is_evaluation_seed(seed):
                return step
        raise DataError(
            f"{_MAX_DRAWS} draws from seed {seed} gave no layout of task {task!r} on its side of the split; this "
            "environment has too few of them, use layouts='any'"
        )

    def step(self, action: Array) -> Step:
        return self.inner.step(action)

    def render(self, camera: str | None = None) -> Array:
        return self.inner.render(camera)

    def close(self) -> None:
        self.inner.close()


def is_evaluation_layout(layout: Array) -> bool:
    """On which side of the split an episode lies that begins so."""
    cells = np.round(np.asarray(layout, np.float64) / _CELL).astype(np.int64)
    return bool(hashlib.sha256(cells.tobytes()).digest()[0] & 1)
