"""Runs the scripts of the peers, each in the venv it needs."""

from replay_parts.workload import Workload

PEERS = ()


def measure_peer(peer, name, workload, *, seconds, rates, unavailable):
    raise NotImplementedError
