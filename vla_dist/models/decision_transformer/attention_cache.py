"""What attention needs of the tokens that a policy has seen, as it lies in its states: one buffer a robot.

Shapes: B rows, N layers, P parts of a token (key and value; with one head the normed token itself), C tokens, D width.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vla_dist.core.types import Array


class TokenBuffer:
    """Room for a whole window of one robot. Each place is written once, so that older states keep what they saw."""

    def __init__(self, shape: tuple[int, int, int, int]) -> None:
        """Args:
        shape: (N, P, C, D).
        """
        self.tensor = torch.empty(shape)
        self.array: Array = self.tensor.numpy()
        self._num_taken = 0
        self._lock = threading.Lock()

    def claim(self, start: int, stop: int) -> bool:
        """Reserve the places from ``start``; False where another future of the same past was written there."""
        with self._lock:
            if self._num_taken != start:
                return False
            self._num_taken = stop
            return True


class _InBuffer:
    """Where a cache lies, which is no part of what a state says: whoever stores or sends a state leaves it out."""

    __slots__ = ("buffer",)

    buffer: TokenBuffer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionCache(_InBuffer):
    """Of the steps that one state remembers, up to the newest state token."""

    keys_values: Array
    """(N, P, C, D) float32, read-only: the first C places of the buffer."""
    goal: Array
    """(G,) float32, read-only: with another goal every key would be another one."""
    maker: int
    """Which policy object made it: another one may have other weights."""

    @classmethod
    def of(cls, buffer: TokenBuffer, length: int, *, goal: Array, maker: int) -> AttentionCache:
        """The first ``length`` places of a buffer."""
        view = buffer.array[:, :, :length]
        view.flags.writeable = False
        cache = cls(keys_values=view, goal=goal, maker=maker)
        object.__setattr__(cache, "buffer", buffer)
        return cache

    @property
    def length(self) -> int:
        """C."""
        return self.keys_values.shape[2]

    def room(self, num: int) -> TokenBuffer:
        """A buffer that holds these tokens and has ``num`` places behind them for the caller alone: this one's own,
        or a copy.
        """
        length = self.length
        if self.buffer.claim(length, length + num):
            return self.buffer
        return _filled(self.buffer.array.shape, self.keys_values, length + num)


def gather_buffers(buffers: Sequence[TokenBuffer], lengths: Sequence[int], *, room: int) -> tuple[Tensor, Tensor]:
    """Buffers of different lengths as one batch, aligned at their ends.

    Returns:
        (N, P, B, C + room, D) with the last ``room`` places free, and (B, C + room) bool, True where there is a token
        or room for one.
    """
    longest = max(lengths)
    layers, parts, _, width = buffers[0].array.shape
    together = np.zeros((layers, parts, len(buffers), longest + room, width), np.float32)
    for row, (buffer, length) in enumerate(zip(buffers, lengths, strict=True)):
        together[:, :, row, longest - length : longest] = buffer.array[:, :, :length]
    is_key = np.arange(longest + room) >= longest - np.array(lengths)[:, None]
    return torch.from_numpy(together), torch.from_numpy(is_key)


def scatter_newest(together: Tensor, buffers: Sequence[TokenBuffer], lengths: Sequence[int], *, num: int) -> None:
    """Write the last ``num`` tokens of a batch behind the ``lengths`` of each row's own buffer."""
    newest = together[:, :, :, -num:].float().cpu().numpy()
    for row, (buffer, length) in enumerate(zip(buffers, lengths, strict=True)):
        buffer.array[:, :, length : length + num] = newest[:, :, row]


def split_window(together: Tensor, lengths: Sequence[int], *, num_prefix: int, capacity: int) -> list[TokenBuffer]:
    """(N, P, B, C, D) to one buffer a row: its ``num_prefix`` first tokens and the last of its ``lengths`` in all.

    Each is its own, so that an idle robot does not keep the memory of a whole batch alive.
    """
    arrays = together.float().cpu().numpy()
    layers, parts, _, total, width = arrays.shape
    made = []
    for row, length in enumerate(lengths):
        later = total - length + num_prefix
        own = np.concatenate([arrays[:, :, row, :num_prefix], arrays[:, :, row, later:]], 2)
        made.append(_filled((layers, parts, capacity, width), own, length))
    return made


def _filled(shape: tuple[int, ...], tokens: Array, num_taken: int) -> TokenBuffer:
    layers, parts, capacity, width = shape
    buffer = TokenBuffer((layers, parts, capacity, width))
    buffer.array[:, :, : tokens.shape[2]] = tokens
    buffer.claim(0, num_taken)
    return buffer
