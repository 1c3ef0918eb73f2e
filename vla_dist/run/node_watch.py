"""A worker node cleans up after itself.

`ray down` stops Ray on the head of an on-premises cluster and nowhere else. A raylet without its head ends after a
minute, but its agents stay for ever; whoever watches here ends them. While Ray runs, slots that it lost are given back.
"""

import fcntl
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from vla_dist.run.gateways import end_gateways
from vla_dist.run.leaked_leases import LeakedLeases
from vla_dist.run.serve_settings import NODE_FOLDER

_LOCK, _LOG = "watch.lock", "watch.log"
_TICK_S = 2.0
_START_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 60.0


def start_watch(folder: Path) -> None:
    """Watch this node from a process of its own, unless one does already.

    Args:
        folder: of its lock and log.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    words = [sys.executable, "-m", "vla_dist.cli", "cluster", "watch", "--folder", str(folder)]
    with open(folder / _LOG, "a") as log:
        subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def watch_node(folder: Path, *, grace_s: float) -> None:
    """Return when Ray has gone from this node and nothing of it is left.

    Args:
        grace_s: a raylet that is missing for this long has ended, rather than being started again.
    """
    with open(folder / _LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        _wait_for(_has_raylet, timeout_s=_START_TIMEOUT_S)
        leaked, missing_since = LeakedLeases(), None
        while missing_since is None or time.monotonic() - missing_since < grace_s:
            if _has_raylet():
                missing_since = None
                for what in leaked.end():
                    print(f"{time.ctime()}: a slot that Ray held for a lost {what} is free again", flush=True)
            elif missing_since is None:
                missing_since = time.monotonic()
            time.sleep(_TICK_S)
        print(f"{time.ctime()}: Ray has gone from this node; its remains are ended", flush=True)
        subprocess.run(["ray", "stop", "--force"], timeout=_STOP_TIMEOUT_S, check=False)
        end_gateways(Path(NODE_FOLDER), only_orphans=True)


def _has_raylet() -> bool:
    return any(process.info["name"] == "raylet" for process in psutil.process_iter(["name"]))


def _wait_for(condition: Callable[[], bool], *, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(_TICK_S)
