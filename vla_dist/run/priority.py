"""Who computes first where several parts of a run share a machine: whoever answers robots.

Ray starts all of its workers at niceness 15, replicas of the policy service too, below whatever else the machine does.
Here they start at 0 (``serve_settings``), and everything that can wait makes way by itself.
"""

import gc
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
    """For a process that answers robots, when its services are built: nothing else keeps the interpreter for long.

    Python lets a thread that computes keep it for 5 ms while others want it; an answer changes threads three times (in,
    computed, out), and a version that is being loaded computes beside them. A full search for garbage looks at every
    object, half a million once Ray and torch are imported, and stops all threads for some 0.2 s: what is there
    now stays, and is not looked at again.
    """
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    gc.collect()
    gc.freeze()
