"""Memory of a run: all its processes, pages they share counted once."""

import threading

import psutil


def tree_memory_bytes(root_pid: int) -> int:
    """Proportional set size of a process and all its descendants; resident size where the kernel tells no more."""
    total = 0
    try:
        processes = [psutil.Process(root_pid), *psutil.Process(root_pid).children(recursive=True)]
    except psutil.Error:
        return 0
    for process in processes:
        try:
            total += _proportional(process.pid)
        except OSError:
            continue
    return total


def _proportional(pid: int) -> int:
    with open(f"/proc/{pid}/smaps_rollup") as rollup:
        for line in rollup:
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


class MemoryWatch:
    """Samples the memory of this process's tree in a thread and keeps the peak."""

    def __init__(self, root_pid: int, *, every_s: float = 3.0) -> None:
        self.current_bytes = 0
        self.peak_bytes = 0
        self._root_pid = root_pid
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5.0)

    def _watch(self) -> None:
        # The run controller decides when this ends.
        while not self._stop.is_set():
            self.current_bytes = tree_memory_bytes(self._root_pid)
            self.peak_bytes = max(self.peak_bytes, self.current_bytes)
            self._stop.wait(self._every_s)
