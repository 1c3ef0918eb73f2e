"""Windows of K steps cut out of stacked segment rows, across segment borders.

Dimensions: B windows, K context steps, N rows, T segment steps, M segments that one window can touch.
"""

from dataclasses import dataclass

import numpy as np

from vla_dist.core.errors import DataError
from vla_dist.core.types import Array


def segments_per_window(context_steps: int, num_steps: int) -> int:
    """M: the most segments of T steps that K consecutive steps can touch."""
    return 1 + -(-(context_steps - 1) // num_steps)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WindowIndex:
    """Where each step of each window lies."""

    rows: Array
    """(B, K) int64 row of each step; 0 where padded."""
    offsets: Array
    """(B, K) int64 step within its row, 0..T-1; 0 where padded."""
    timesteps: Array
    """(B, K) int64 index within the episode; 0 where padded."""
    padding_mask: Array
    """(B, K) bool, True where the step is real."""

    @classmethod
    def ending_at(
        cls, *, window_rows: Array, segment_indices: Array, offsets: Array, context_steps: int, num_steps: int
    ) -> "WindowIndex":
        """Windows of the K steps up to and including one step.

        Args:
            window_rows: (B, M) row of each segment a window touches, the last segment rightmost; -1 where not needed.
            segment_indices: (B,) index within its episode of the rightmost segment.
            offsets: (B,) step within the rightmost segment at which the window ends.
            context_steps: K.
            num_steps: T.

        Raises:
            DataError: a window needs a row that is -1.
        """
        num_rows = window_rows.shape[1]
        ends = segment_indices.astype(np.int64) * num_steps + offsets
        steps = ends[:, None] - np.arange(context_steps - 1, -1, -1)
        mask = steps >= 0
        steps = np.where(mask, steps, 0)
        columns = steps // num_steps - segment_indices[:, None] + num_rows - 1
        # A padded step would point before the first column; any column will do, its values are masked.
        columns = np.where(mask, columns, num_rows - 1)
        if (columns < 0).any():
            raise DataError(
                f"windows of {context_steps} steps touch more than the {num_rows} segments given; "
                f"give segments_per_window({context_steps}, {num_steps}) columns"
            )
        rows = np.take_along_axis(window_rows.astype(np.int64), columns, axis=1)
        if (rows[mask] < 0).any():
            raise DataError("a window needs a segment that was not given (row -1); fetch the earlier segments too")
        return cls(
            rows=np.where(mask, rows, 0),
            offsets=np.where(mask, steps % num_steps, 0),
            timesteps=steps,
            padding_mask=mask,
        )

    def gather(self, column: Array) -> Array:
        """(N, T, ...) to (B, K, ...): a copy, zero where padded."""
        windows = column[self.rows, self.offsets]
        windows[~self.padding_mask] = 0
        return windows
