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
        # Side by side: slots are looked up at random.
        self._marks = np.zeros(num_slots, [("number", np.int64), ("stamp", np.float64)])
        self.numbers: Array = self._marks["number"]
        """(S,) int64 of the row in each slot, -1 for none."""
        self.stamps: Array = self._marks["stamp"]
        """(S,) when its episode became whole: numbers begin again where a server lost its data."""
        self.numbers[:] = -1

    def __len__(self) -> int:
        return len(self.numbers)

    def find(self, numbers: Array, stamps: Array) -> tuple[Array, Array]:
        """Slots (N,) of rows, and (N,) bool, which of them hold their row."""
        slots = numbers % len(self.numbers)
        marks = self._marks.take(slots)
        return slots, (marks["number"] == numbers) & (marks["stamp"] == stamps)

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
