"""Who computes first where several parts of a run share a machine: whoever answers robots.

Ray starts all of its workers at niceness 15, replicas of the policy service too, below whatever else the machine does.
Here they start at 0 (``serve_settings``), and everything that can wait makes way by itself.
"""

import os
import sys
from pathlib import Path

_NICENESS = 10
_SWITCH_INTERVAL_S = 0.0005


def make_way() -> None:
    """Give this process, with the threads it has and will have, less of a busy CPU than the policy service gets."""
    threads = Path("/proc/self/task")
    for thread in threads.iterdir() if threads.is_dir() else [Path("0")]:
        try:
            # On Linux a priority belongs to a thread; who has a lower one already keeps it.
            niceness = os.getpriority(os.PRIO_PROCESS, int(thread.name))
            os.setpriority(os.PRIO_PROCESS, int(thread.name), max(niceness, _NICENESS))
        except ProcessLookupError:
            continue


def answer_promptly() -> None:
    """For a process that answers robots: its event loop waits less long for the interpreter.

    Python lets a thread that computes keep the interpreter for 5 ms while others want it. An answer changes threads
    three times (in, computed, out), and a version that is being loaded beside them is one more that computes.
    """
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
