"""Seeds that cannot leak: training and evaluation draw from disjoint halves by construction."""

import hashlib

from vla_dist.core.errors import ConfigError

_HALF = 2**31
_LANES = 2**10
ROLLOUT_LANES = 2**9
"""Lanes below are those of rollout workers, robots have the others."""
_REHEARSAL_LANE = _LANES - 1


def training_seed(run_seed: int, worker_index: int, episode_index: int) -> int:
    """A seed below 2**31; distinct workers of a run own distinct residues."""
    if not 0 <= worker_index < _LANES:
        raise ConfigError(f"worker_index {worker_index} must be within 0..{_LANES - 1}")
    base = int.from_bytes(hashlib.sha256(f"train/{run_seed}/{episode_index}".encode()).digest()[:4], "big")
    return (base % (_HALF // _LANES)) * _LANES + worker_index


def rehearsal_seed(suite_seed: int, episode_index: int) -> int:
    """A seed that training may have, of a lane that no worker owns: to try a policy on what may then be taught."""
    return training_seed(suite_seed, _REHEARSAL_LANE, episode_index)


def evaluation_seed(suite_seed: int, episode_index: int) -> int:
    """A seed of 2**31 or more: no training episode can have it. Equal arguments give paired episodes."""
    base = int.from_bytes(hashlib.sha256(f"eval/{suite_seed}/{episode_index}".encode()).digest()[:4], "big")
    return _HALF + base % _HALF


def is_evaluation_seed(seed: int) -> bool:
    return seed >= _HALF


def redrawn_seed(seed: int, draw: int) -> int:
    """The seed itself at draw 0, then further ones on the same side: for who must draw until something fits."""
    if draw == 0:
        return seed
    base = int.from_bytes(hashlib.sha256(f"again/{seed}/{draw}".encode()).digest()[:4], "big") % _HALF
    return base + _HALF * is_evaluation_seed(seed)
