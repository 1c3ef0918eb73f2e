"""Rows that a reader fetched before, kept in its own memory.

A stored row never changes, so whatever the index still names may be taken from here: while a buffer is sampled several
times for each insert, each row crosses the socket about once.

Dimensions: N rows, T segment steps, D numbers of a step, S slots.
"""

import threading

import numpy as np

from vla_dist.core.types import Array
from vla_dist.replay.row_slots import RowSlots

_LEAST_SLOTS = 256


class RowCache:
    """Steps of rows by row number; threads may share it under its lock.

    Slots grow with the rows there are, up to the memory allowed.
    """

    def __init__(self, num_steps: int, num_columns: int, *, max_bytes: int) -> None:
        """``num_steps`` is T, ``num_columns`` is D."""
        self.lock = threading.Lock()
        self._shape = (num_steps, num_columns)
        self._max_slots = max_bytes // (4 * num_steps * num_columns)
        num_slots = min(_LEAST_SLOTS, self._max_slots)
        self._slots = RowSlots(num_slots)
        self._rows = np.empty((num_slots, *self._shape), np.float32)

    @property
    def holds_rows(self) -> bool:
        """Whether there is room for a single one."""
        return self._max_slots > 0

    @property
    def steps(self) -> Array:
        """(S * T, D) float32 memory of all slots; row r of slot s begins at s * T."""
        return self._rows.reshape(-1, self._shape[1])

    def find(self, numbers: Array, stamps: Array) -> tuple[Array, Array]:
        """Slots (N,) of rows, and (N,) bool, which of them hold their row; see ``RowSlots``."""
        return self._slots.find(numbers, stamps)

    def admits(self, numbers: Array, *, oldest: int, newest: int) -> Array:
        """(N,) bool, rows that are to be kept once they are fetched.

        Args:
            numbers: (N,) distinct numbers of rows that are not here.
            oldest: no stored row has a smaller number.
            newest: none has a larger one.
        """
        wanted = min(2 * (newest - oldest + 1), self._max_slots)
        if newest - oldest >= len(self._slots) < wanted:
            self._resize(wanted)
        # Of new rows that want the same slot the first gets it.
        first = np.zeros(len(numbers), bool)
        first[np.unique(numbers % len(self._slots), return_index=True)[1]] = True
        # What is not here and has its number in the slot is a row of a server that counts anew.
        return first & self._slots.is_open(numbers, oldest=oldest, newest=newest)

    def put(self, numbers: Array, stamps: Array, steps: Array) -> None:
        """Keep (N, T, D) float32 ``steps`` of rows with distinct slots; others are moved out."""
        self._slots.assign(numbers, stamps)
        self._rows[numbers % len(self._slots)] = steps

    def _resize(self, num_slots: int) -> None:
        old, old_rows = self._slots, self._rows
        self._slots, self._rows = RowSlots(num_slots), np.empty((num_slots, *self._shape), np.float32)
        kept = np.flatnonzero(old.numbers >= 0)
        self.put(old.numbers[kept], old.stamps[kept], old_rows[kept])
