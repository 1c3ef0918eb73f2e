"""A limit on what a robot sends, so that uploads leave room for control."""

import threading
import time

from vla_dist.core.errors import ConfigError


class Bandwidth:
    """A token bucket: on average at most ``bytes_per_s``, in bursts at most one second of it or one message."""

    def __init__(self, bytes_per_s: float | None) -> None:
        """None: no limit."""
        if bytes_per_s is not None and bytes_per_s <= 0:
            raise ConfigError(f"bytes_per_s {bytes_per_s} must be positive, or None for no limit")
        self._bytes_per_s = bytes_per_s
        self._tokens = bytes_per_s or 0.0
        self._refilled_at = time.monotonic()

    def take(self, num_bytes: int, *, stop: threading.Event) -> bool:
        """Wait for the turn of so many bytes; False where ``stop`` was set first."""
        if self._bytes_per_s is None:
            return not stop.is_set()
        now = time.monotonic()
        self._tokens = min(self._bytes_per_s, self._tokens + (now - self._refilled_at) * self._bytes_per_s)
        self._refilled_at = now
        # A message larger than the bucket goes when the bucket is full, and leaves a debt.
        needed = min(float(num_bytes), self._bytes_per_s)
        if self._tokens < needed and stop.wait((needed - self._tokens) / self._bytes_per_s):
            return False
        now = time.monotonic()
        self._tokens += (now - self._refilled_at) * self._bytes_per_s - num_bytes
        self._refilled_at = now
        return True
