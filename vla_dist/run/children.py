"""Processes that must not outlive the one that started them."""

import signal
import sys


def die_with_parent() -> None:
    """For ``preexec_fn``: SIGTERM when the thread that started this process ends, killed or not (Linux)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
