"""Windows of K steps as ranges of steps within segments, across segment borders.

Dimensions: B windows, K context steps, T segment steps, N pieces: each the steps of one window within one segment.
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
    """(B,) int64, steps of each window that are real, 1..K; the rest is padding on the left."""
    timesteps: Array
    """(B, K) int64, index within the episode; 0 where padded."""
    padding_mask: Array
    """(B, K) bool, True where the step is real."""

    @classmethod
    def ending_at(cls, segments: Array, offsets: Array, *, context_steps: int, num_steps: int) -> "WindowPieces":
        """Windows of the K steps up to and including one step.

        Args:
            segments: (B,) index within its episode of the segment in which each window ends.
            offsets: (B,) step within that segment at which it ends, 0..T-1.
            context_steps: K.
            num_steps: T.
        """
        ends = segments.astype(np.int64) * num_steps + offsets
        starts = np.maximum(ends - context_steps + 1, 0)
        first_segments = starts // num_steps
        per_window = segments - first_segments + 1
        windows = np.repeat(np.arange(len(ends)), per_window)
        # Within each window its pieces are numbered 0, 1, ...
        numbers = np.arange(len(windows)) - np.repeat(np.cumsum(per_window) - per_window, per_window)
        piece_segments = first_segments[windows] + numbers
        firsts = np.maximum(starts[windows] - piece_segments * num_steps, 0)
        lasts = np.minimum(ends[windows] - piece_segments * num_steps, num_steps - 1)
        steps = ends[:, None] - np.arange(context_steps - 1, -1, -1)
        return cls(
            windows=windows,
            segments=piece_segments,
            firsts=firsts,
            counts=lasts - firsts + 1,
            num_valid=ends - starts + 1,
            timesteps=np.maximum(steps, 0),
            padding_mask=steps >= 0,
        )

    def step_index(self) -> Array:
        """(B, K) int64 position of each step among the steps of all pieces, counted from 1; 0 where padded.

        So ``concatenate([zeros, all pieces])[index]`` are the windows, zero where padded.
        """
        context_steps = self.padding_mask.shape[1]
        ends = np.cumsum(self.num_valid)
        index = ends[:, None] - np.arange(context_steps - 1, -1, -1)
        return np.where(self.padding_mask, index, 0)
