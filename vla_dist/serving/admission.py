"""How much one robot, and all of them, may ask for."""

import time


class RateLimit:
    """A token bucket: ``per_s`` on average, ``burst`` at once."""

    __slots__ = ("_burst", "_filled_at", "_level", "_per_s")

    def __init__(self, per_s: float, *, burst: float | None = None) -> None:
        self._per_s = per_s
        self._burst = per_s if burst is None else burst
        self._level = self._burst
        self._filled_at = time.monotonic()

    def take(self) -> bool:
        """Whether one more is within the limit."""
        now = time.monotonic()
        self._level = min(self._burst, self._level + (now - self._filled_at) * self._per_s)
        self._filled_at = now
        if self._level < 1:
            return False
        self._level -= 1
        return True
