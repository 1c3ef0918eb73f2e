"""Runs the scripts of the peers, each in the venv it needs, and takes in what they say."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from replay_parts.workload import Workload

_FOLDER = Path(__file__).parents[1] / "replay_peers"
_TIMEOUT_S = 2400.0
"""The first run installs what the peer needs."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A script of ``replay_peers`` and how its clients reach the data."""

    name: str
    script: str
    transport: str
    processes: tuple[int, ...]


PEERS = (
    Peer("reverb", "dm_reverb.py", "tcp", (1, 2)),
    Peer("torchrl", "torchrl_slices.py", "in_process", (1,)),
    Peer("rllib", "rllib_episodes.py", "in_process", (1,)),
)


def measure_peer(peer: Peer, name: str, workload: Workload, *, seconds: float) -> Mapping[str, Mapping[str, object]]:
    """System -> the script's answer, or ``{"unavailable": why}``."""
    answers: dict[str, Mapping[str, object]] = {}
    for processes in peer.processes:
        options = {
            "--workload": name,
            "--seconds": seconds,
            "--processes": processes,
            "--windows": workload.windows,
        }
        words = [str(word) for pair in options.items() for word in pair]
        done = subprocess.run(
            [sys.executable, str(_FOLDER / peer.script), *words],
            stdout=subprocess.PIPE,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        answers[f"{peer.name}/{peer.transport}/{processes}"] = (
            json.loads(lines[-1]) if lines else {"unavailable": f"{peer.script} ended with status {done.returncode}"}
        )
    return answers
