"""Processes that must not outlive the one that started them."""

import os
import signal
import sys
import threading
import time

_TICK_S = 0.5


def die_with_parent() -> None:
    """For ``preexec_fn``: SIGTERM when the thread that started this process ends, killed or not (Linux)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def end_when_orphaned(*, grace_s: float = 20.0) -> None:
    """End this process, with kill -9, when the one that started it has ended; from a thread that dies with it.

    A driver that Ray's jobs started needs it: when Ray is killed on the head, the supervisor of the job ends together
    with the shell that it started and with the watcher that should end what that shell started, but the driver goes on.

    Args:
        grace_s: a driver that is stopped together with its shell gets this long to end by itself.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_TICK_S)
        time.sleep(grace_s)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="orphan-watch", daemon=True).start()
