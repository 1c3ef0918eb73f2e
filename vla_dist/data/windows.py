"""Windows of steps as ranges of steps within segments, across segment borders.

Dimensions: B windows, K context steps, F future steps, W = K + F, T segment steps, N pieces: each the steps of one
window within one segment.
"""

from dataclasses import dataclass

import numpy as np

from vla_dist.core.types import Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WindowPieces:
    """Where the steps of each window lie; the pieces of a window follow each other in time, windows in order."""

    windows: Array
    """(N,) int64, window of each piece."""
    segments: Array
    """(N,) int64, index of the segment within its episode."""
    firsts: Array
    """(N,) int64, first step within the segment."""
    counts: Array
    """(N,) int64, consecutive steps, 1..T."""
    num_valid: Array
    """(B,) int64, steps of each window that are real, 1..W."""
    timesteps: Array
    """(B, W) int64, index within the episode; 0 where padded."""
    padding_mask: Array
    """(B, W) bool, True where the step is real: neither before the episode nor after it."""

    @classmethod
    def around(
        cls,
        segments: Array,
        offsets: Array,
        *,
        context_steps: int,
        num_steps: int,
        future_steps: int = 0,
        episode_lengths: Array | None = None,
    ) -> "WindowPieces":
        """Windows of the K steps up to and including one step, and of the F steps after it.

        Args:
            segments: (B,) index within its episode of the segment that holds each window's step.
            offsets: (B,) place of the step within that segment, 0..T-1.
            context_steps: K.
            num_steps: T.
            future_steps: F.
            episode_lengths: (B,) steps of the episodes; needed where F is not 0.
        """
        newest = segments.astype(np.int64) * num_steps + offsets
        starts, ends = np.maximum(newest - context_steps + 1, 0), newest
        if future_steps:
            assert episode_lengths is not None
            ends = np.minimum(newest + future_steps, episode_lengths.astype(np.int64) - 1)
        first_segments = starts // num_steps
        per_window = (ends // num_steps if future_steps else segments) - first_segments + 1
        windows = np.repeat(np.arange(len(ends)), per_window)
        # Within each window its pieces are numbered 0, 1, ...
        numbers = np.arange(len(windows)) - np.repeat(np.cumsum(per_window) - per_window, per_window)
        piece_segments = first_segments[windows] + numbers
        firsts = np.maximum(starts[windows] - piece_segments * num_steps, 0)
        lasts = np.minimum(ends[windows] - piece_segments * num_steps, num_steps - 1)
        steps = newest[:, None] + np.arange(1 - context_steps, 1 + future_steps)
        mask = (steps >= 0) & (steps <= ends[:, None]) if future_steps else steps >= 0
        return cls(
            windows=windows,
            segments=piece_segments,
            firsts=firsts,
            counts=lasts - firsts + 1,
            num_valid=ends - starts + 1,
            timesteps=np.where(mask, steps, 0),
            padding_mask=mask,
        )

    @property
    def is_full(self) -> bool:
        """Whether no step is padding."""
        return int(self.counts.sum()) == self.padding_mask.size

    def arrange(self, values: Array) -> Array:
        """(B, W) of one value for each real step, given in the order of the pieces; 0 where padded."""
        if self.is_full:
            return values.reshape(self.padding_mask.shape)
        arranged = np.zeros(self.padding_mask.shape, values.dtype)
        arranged[self.padding_mask] = values
        return arranged
