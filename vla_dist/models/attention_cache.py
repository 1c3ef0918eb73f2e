"""Keys and values of what a policy has seen, as they lie in its states: one array a robot, gathered into a batch.

Shapes: B rows, N layers, C tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vla_dist.core.types import Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionCache:
    """Of the steps that one state remembers, up to the newest state token."""

    keys_values: Array
    """(N, 2, C, D) float32, read-only."""
    goal: Array
    """(G,) float32, read-only: with another goal every key would be another one."""
    maker: int
    """Which policy object made it: another one may have other weights."""


def gather_caches(caches: Sequence[AttentionCache], *, room: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Caches of different lengths as one batch, aligned at their ends.

    Returns:
        (N, 2, B, C + room, D) with the last ``room`` places free, and (B, C) bool, True where there is a token.
    """
    lengths = [cache.keys_values.shape[2] for cache in caches]
    longest = max(lengths)
    layers, _, _, width = caches[0].keys_values.shape
    together = np.zeros((layers, 2, len(caches), longest + room, width), np.float32)
    for row, (cache, length) in enumerate(zip(caches, lengths, strict=True)):
        together[:, :, row, longest - length : longest] = cache.keys_values
    is_key = np.arange(longest) >= longest - np.array(lengths)[:, None]
    return torch.from_numpy(together).to(device), torch.from_numpy(is_key).to(device)


def split_cache(
    together: Tensor, lengths: Sequence[int], goals: Sequence[Array], *, num_prefix: int, maker: int
) -> list[AttentionCache]:
    """(N, 2, B, C, D) to one cache a row: its ``num_prefix`` first tokens and the last of its ``lengths`` in all.

    Each is a copy, so that an idle robot does not keep the memory of a whole batch alive.
    """
    arrays = together.float().cpu().numpy()
    total = arrays.shape[3]
    rows = []
    for row, (length, goal) in enumerate(zip(lengths, goals, strict=True)):
        own = np.empty((*arrays.shape[:2], length, arrays.shape[4]), np.float32)
        own[:, :, :num_prefix] = arrays[:, :, row, :num_prefix]
        own[:, :, num_prefix:] = arrays[:, :, row, total - length + num_prefix :]
        wanted = goal.copy()
        own.flags.writeable = wanted.flags.writeable = False
        rows.append(AttentionCache(keys_values=own, goal=wanted, maker=maker))
    return rows
