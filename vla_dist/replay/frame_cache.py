"""Frames that a reader fetched, or decoded, before, kept in its own memory.

Dimensions: N pieces, T segment steps, S slots.
"""

import threading
from collections.abc import Sequence

import numpy as np

from vla_dist.core.types import Array
from vla_dist.replay.row_slots import RowSlots


class FrameCache:
    """Frames of one camera by row number and step; threads may share it under its lock.

    Each frame is kept by itself: rows of frames are large, and a window seldom wants a whole one.
    """

    def __init__(self, num_steps: int, frame_bytes: int, *, max_bytes: int) -> None:
        """``num_steps`` is T. The memory is taken as frames come."""
        self.lock = threading.Lock()
        num_slots = max_bytes // (num_steps * frame_bytes)
        self._slots = RowSlots(num_slots)
        # The operating system gives pages of it when they are first written.
        self._frames = np.empty((num_slots, num_steps, frame_bytes), np.uint8)
        self._there = np.zeros((num_slots, num_steps), bool)

    def find(self, numbers: Array, stamps: Array, firsts: Array, counts: Array) -> list[Array | None]:
        """(count, bytes) uint8 views of the frames of each piece; None where one of them is not here.

        Args:
            numbers: (N,) of the rows in which the pieces lie.
            stamps: (N,) see ``RowSlots``.
            firsts: (N,) first step within the row.
            counts: (N,) steps, 1..T.
        """
        if not len(self._slots):
            return [None] * len(numbers)
        slots, held = self._slots.find(numbers, stamps)
        pieces = zip(slots.tolist(), held.tolist(), firsts.tolist(), (firsts + counts).tolist(), strict=True)
        return [
            self._frames[slot, first:end] if is_held and self._there[slot, first:end].all() else None
            for slot, is_held, first, end in pieces
        ]

    def keep(
        self, numbers: Array, stamps: Array, firsts: Array, frames: Sequence[Array], *, oldest: int, newest: int
    ) -> None:
        """Keep the (count, bytes) ``frames`` of each piece whose row has a place; arguments as above.

        Args:
            oldest: no stored row has a smaller number.
            newest: none has a larger one.
        """
        if not len(self._slots):
            return
        for piece, first in enumerate(firsts.tolist()):
            number, stamp = numbers[piece : piece + 1], stamps[piece : piece + 1]
            # One after the other: an earlier piece may have taken the slot.
            if not self._slots.is_open(number, oldest=oldest, newest=newest).all():
                continue
            (slot,), (held,) = self._slots.find(number, stamp)
            if not held:
                self._slots.assign(number, stamp)
                self._there[slot] = False
            end = first + len(frames[piece])
            self._frames[slot, first:end] = frames[piece]
            self._there[slot, first:end] = True
