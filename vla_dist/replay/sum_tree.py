"""Weights with their sums in a binary tree: drawing n of them and changing n of them costs O(n log size), in NumPy.

Source: Schaul et al. 2016, "Prioritized Experience Replay", appendix B.2.1. Sums are always taken anew from both
children, so they do not drift.
"""

import numpy as np

from vla_dist.core.types import Array


class SumTree:
    """Non-negative weights at positions 0, 1, 2, ...; positions never written weigh 0."""

    def __init__(self) -> None:
        self._half = 1024
        self._nodes = np.zeros(2 * self._half)

    @property
    def total(self) -> float:
        return float(self._nodes[1])

    def weights(self, positions: Array) -> Array:
        return self._nodes[self._half + positions]

    def write(self, positions: Array, weights: Array) -> None:
        """Set ``weights`` (n,) at ``positions`` (n,); of equal positions the last counts."""
        if not len(positions):
            return
        self._grow(int(positions.max()) + 1)
        self._nodes[self._half + positions] = weights
        # Sorted parents without repetition: each sum is taken once a level.
        nodes = np.unique((self._half + positions) >> 1)
        while nodes[0] >= 1:
            self._nodes[nodes] = self._nodes[2 * nodes] + self._nodes[2 * nodes + 1]
            if nodes[0] == 1:
                return
            nodes = nodes >> 1
            nodes = nodes[np.concatenate([[True], nodes[1:] != nodes[:-1]])]

    def draw(self, num: int, rng: np.random.Generator) -> Array:
        """(num,) positions in proportion to their weights, one from each of ``num`` equal parts of the total.

        The total must be above 0.
        """
        aims = (np.arange(num) + rng.random(num)) * (self.total / num)
        nodes = np.ones(num, np.int64)
        while nodes[0] < self._half:
            left = self._nodes[2 * nodes]
            # Rounding may push an aim beyond the last weight: never step into an empty half.
            right = (aims >= left) & (self._nodes[2 * nodes + 1] > 0)
            aims = np.where(right, aims - left, np.minimum(aims, left))
            nodes = 2 * nodes + right
        return nodes - self._half

    def clear(self) -> None:
        self._nodes[:] = 0

    def _grow(self, size: int) -> None:
        if size <= self._half:
            return
        leaves = self._nodes[self._half :]
        self._half = 1 << (size - 1).bit_length()
        self._nodes = np.zeros(2 * self._half)
        self._nodes[self._half : self._half + len(leaves)] = leaves
        level = self._half >> 1
        while level >= 1:
            self._nodes[level : 2 * level] = (
                self._nodes[2 * level : 4 * level : 2] + self._nodes[2 * level + 1 : 4 * level : 2]
            )
            level >>= 1
