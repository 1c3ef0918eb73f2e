"""Rows that a reader fetched before, kept in its own memory.

A stored row never changes, so whatever the index still names may be taken from here: while a buffer is sampled several
times for each insert, each row crosses the socket about once.

Dimensions: N rows, T segment steps, D numbers of a step, S slots.
"""

import threading

import numpy as np

from vla_dist.core.types import Array

_LEAST_SLOTS = 256


class RowCache:
    """Steps of rows by row number, in a slot each: number modulo S. Threads may share it under its lock.

    Row numbers are those of ``EpisodeIndex``: stored rows have numbers close to each other, so S slots hold the last S
    of them. S grows with the rows there are, up to the memory allowed; beyond it, a row stays until it leaves the
    buffer, and rows that find their slot taken are not kept.
    """

    def __init__(self, num_steps: int, num_columns: int, *, max_bytes: int) -> None:
        """``num_steps`` is T, ``num_columns`` is D."""
        self.lock = threading.Lock()
        self._shape = (num_steps, num_columns)
        self._max_slots = max_bytes // (4 * num_steps * num_columns)
        self._resize(min(_LEAST_SLOTS, self._max_slots))

    @property
    def holds_rows(self) -> bool:
        """Whether there is room for a single one."""
        return self._max_slots > 0

    @property
    def steps(self) -> Array:
        """(S * T, D) float32 memory of all slots; row r of slot s begins at s * T."""
        return self._rows.reshape(-1, self._shape[1])

    def find(self, numbers: Array, stamps: Array) -> tuple[Array, Array]:
        """Slots (N,) of rows, and (N,) bool, which of them hold their row.

        Args:
            numbers: (N,) of the rows.
            stamps: (N,) when their episodes became whole: numbers begin again where a server lost its data.
        """
        slots = numbers % len(self._numbers)
        return slots, (self._numbers[slots] == numbers) & (self._stamps[slots] == stamps)

    def admits(self, numbers: Array, *, oldest: int, newest: int) -> Array:
        """(N,) bool, rows that are to be kept once they are fetched.

        Args:
            numbers: (N,) distinct numbers of rows that are not here.
            oldest: no stored row has a smaller number.
            newest: none has a larger one.
        """
        wanted = min(2 * (newest - oldest + 1), self._max_slots)
        if newest - oldest >= len(self._numbers) < wanted:
            self._resize(wanted)
        slots = numbers % len(self._numbers)
        taken = (self._numbers[slots] >= oldest) & (self._numbers[slots] <= newest) & (self._numbers[slots] != numbers)
        # Of new rows that want the same slot the first gets it.
        first = np.zeros(len(numbers), bool)
        first[np.unique(slots, return_index=True)[1]] = True
        return first & ~taken

    def put(self, numbers: Array, stamps: Array, steps: Array) -> None:
        """Keep (N, T, D) float32 ``steps`` of rows with distinct slots; others are moved out."""
        slots = numbers % len(self._numbers)
        self._rows[slots] = steps
        self._numbers[slots] = numbers
        self._stamps[slots] = stamps

    def _resize(self, num_slots: int) -> None:
        rows = np.empty((num_slots, *self._shape), np.float32)
        numbers, stamps = np.full(num_slots, -1, np.int64), np.zeros(num_slots)
        if hasattr(self, "_numbers"):
            kept = np.flatnonzero(self._numbers >= 0)
            slots = self._numbers[kept] % num_slots
            rows[slots], numbers[slots], stamps[slots] = self._rows[kept], self._numbers[kept], self._stamps[kept]
        self._rows, self._numbers, self._stamps = rows, numbers, stamps
