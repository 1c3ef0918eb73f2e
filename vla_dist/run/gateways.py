"""HAProxy processes of a node: where robots connect.

Serve starts one on each node and ends it. When Serve's own process on the node is killed, its HAProxy goes on: it holds
the gateway's port, so that the next one cannot start, and sends robots where replicas were.
"""

from pathlib import Path

import psutil

_STOP_TIMEOUT_S = 2.0


def gateways(folder: Path) -> list[psutil.Process]:
    """Those whose command line names a configuration in ``folder``: a recycled pid never does."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == "haproxy":
            arguments = process.info["cmdline"] or []
            found += [process] if any(a.startswith(f"{folder}/") for a in arguments) else []
    return found


def end_gateways(folder: Path, *, only_orphans: bool = False) -> list[int]:
    """Stop them; returns their pids.

    Args:
        only_orphans: leave those alone that a process of Ray looks after.
    """
    processes = [one for one in gateways(folder) if not (only_orphans and _is_looked_after(one))]
    for process in processes:
        process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=_STOP_TIMEOUT_S)
    for process in alive:
        process.kill()
    return [process.pid for process in processes]


def _is_looked_after(gateway: psutil.Process) -> bool:
    try:
        parent = gateway.parent()
        return parent is not None and parent.name().startswith("ray::")
    except psutil.NoSuchProcess:
        return False
