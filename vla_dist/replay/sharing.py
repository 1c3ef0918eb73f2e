"""Readers that share each batch, as the ranks of a learner do: each window belongs to one of them.

Shapes: N rows.
"""

from dataclasses import dataclass
from typing import cast

import numpy as np

from vla_dist.core.errors import ConfigError
from vla_dist.core.types import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """Draws windows that end at every ``num``-th step of each row, beginning with another step in each row.

    So no two readers draw the same window, all of them together draw from everything, and each of them sees each
    task, source and outcome. A reader to whom nothing belongs (of a stratum or task, where it has shares), because
    there are hardly more steps than readers, draws from all of it.
    """

    index: int = 0
    num: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.num:
            raise ConfigError(f"reader {self.index} of {self.num} must be within 0..{self.num - 1}")

    @property
    def phase(self) -> float:
        """Readers that draw in step round their shares of strata right for all of them together."""
        return self.index / self.num

    def owns(self, numbers: Array, offsets: Array) -> Array:
        """(N,) bool: whether windows that end at these steps of the rows with these numbers are this reader's."""
        return cast(Array, offsets % self.num == self.first(numbers))

    def first(self, numbers: Array) -> Array:
        """(N,) int64, the first step of its own in rows with these numbers, were they long enough."""
        return cast(Array, (self.index - numbers) % self.num)

    def count(self, numbers: Array, lengths: Array) -> Array:
        """(N,) int64, steps of its own in rows of these lengths."""
        return cast(Array, np.maximum(0, (lengths - self.first(numbers) + self.num - 1) // self.num))


ONLY_READER = Reader()
