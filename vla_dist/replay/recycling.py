"""Large arrays whose memory is used again once nobody looks at it.

Fresh memory of many megabytes costs a page fault every 4 KB, as much as receiving into it.
"""

import sys
import threading

import numpy as np

from vla_dist.core.types import Array

_MOST_KEPT = 4
_probe = [np.empty(1, np.uint8)]
# What sys.getrefcount says of an array that only a list holds; interpreters differ in what they count besides.
_UNUSED = sys.getrefcount(_probe[0])


class RecycledMemory:
    """Gives out uint8 arrays; threads may share it.

    An array goes back by itself: views, tensors and memoryviews made of it refer to it, and it is not given out again
    while any of them lives.
    """

    def __init__(self) -> None:
        self._kept: list[Array] = []
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> Array:
        """(num_bytes,) uint8 holding anything."""
        with self._lock:
            for place in range(len(self._kept)):
                if len(self._kept[place]) >= num_bytes and sys.getrefcount(self._kept[place]) == _UNUSED:
                    return self._kept[place][:num_bytes]
            array = np.empty(num_bytes, np.uint8)
            # The oldest is let go; whoever still looks at it keeps it alive.
            self._kept = [*self._kept[-_MOST_KEPT + 1 :], array]
            return array[:num_bytes]
