"""Who computes first where several parts of a run share a machine: whoever answers robots.

Ray starts all of its workers at niceness 15, replicas of the policy service too, below whatever else the machine does.
Here they start at 0 (``serve_settings``), and everything that can wait makes way by itself.
"""

import os
from pathlib import Path

_NICENESS = 10


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
