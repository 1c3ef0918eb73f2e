"""Which row lies in which of a bounded number of slots: row number modulo the slots.

Dimensions: N rows, S slots.
"""

import numpy as np

from vla_dist.core.types import Array


class RowSlots:
    """Row numbers are those of ``EpisodeIndex``: stored rows have numbers close to each other.

    A row stays until it leaves the buffer; rows that find their slot taken have none.
    """

    def __init__(self, num_slots: int) -> None:
        self.numbers = np.full(num_slots, -1, np.int64)
        """(S,) of the row in each slot, -1 for none."""
        self.stamps = np.zeros(num_slots)
        """(S,) when its episode became whole: numbers begin again where a server lost its data."""

    def __len__(self) -> int:
        return len(self.numbers)

    def find(self, numbers: Array, stamps: Array) -> tuple[Array, Array]:
        """Slots (N,) of rows, and (N,) bool, which of them hold their row."""
        slots = numbers % len(self.numbers)
        return slots, (self.numbers[slots] == numbers) & (self.stamps[slots] == stamps)

    def is_open(self, numbers: Array, *, oldest: int, newest: int) -> Array:
        """(N,) bool, rows whose slot holds no other row that is stored still.

        Args:
            numbers: (N,) of the rows.
            oldest: no stored row has a smaller number.
            newest: none has a larger one.
        """
        there = self.numbers[numbers % len(self.numbers)]
        return (there < oldest) | (there > newest) | (there == numbers)

    def assign(self, numbers: Array, stamps: Array) -> None:
        """The slots of these rows are theirs from now on."""
        slots = numbers % len(self.numbers)
        self.numbers[slots] = numbers
        self.stamps[slots] = stamps
