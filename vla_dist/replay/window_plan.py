"""What must be fetched for a draw, and where it goes.

Dimensions: B windows, K context steps, F future steps, N pieces.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

from vla_dist.core.types import Array
from vla_dist.data.windows import WindowPieces
from vla_dist.replay.index import EpisodeIndex
from vla_dist.replay.samplers import Drawn


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WindowPlan:
    """All that is needed to fetch and assemble a batch, copied from the index so that it may change meanwhile."""

    pieces: WindowPieces
    """Of K + F steps."""
    frame_pieces: WindowPieces
    """Of the K steps whose frames are wanted; the same where F is 0."""
    digests: Array
    """(B,) S16, of the episodes."""
    tail_returns: Array
    """(N,) float64, reward that the episode still collects after each piece's segment."""
    piece_numbers: Array
    """(N,) int64, of the rows in which the pieces lie."""
    frame_numbers: Array
    """The same of ``frame_pieces``."""
    oldest: int
    """No stored row has a smaller number."""
    newest: int
    """None has a larger one."""
    numbers: Array
    """(B,) int64, of the rows in which the windows end."""
    completions: Array
    """(B,) int64, of the episodes."""
    row_lengths: Array
    """(B,) int64, of those rows."""
    episode_lengths: Array
    success: Array
    policy_versions: Array
    completed_at_s: Array
    sources: list[int]
    tasks: list[str]
    instructions: list[str]
    weights: Array | None

    @classmethod
    def of(cls, index: EpisodeIndex, drawn: Drawn, *, context_steps: int, future_steps: int) -> "WindowPlan":
        rows = index.rows.take(drawn.rows)
        episodes = index.episodes.take(rows["episode"])
        segments, lengths = rows["segment"].astype(np.int64), episodes["length"].astype(np.int64)
        around = partial(
            WindowPieces.around, segments, drawn.offsets, context_steps=context_steps, num_steps=index.num_steps
        )
        pieces = around(future_steps=future_steps, episode_lengths=lengths)
        frame_pieces = around() if future_steps else pieces

        def rows_of(pieces: WindowPieces) -> Array:
            # The rows of an episode stand side by side, so another segment is found by its distance.
            return index.rows.take(drawn.rows[pieces.windows] - (segments[pieces.windows] - pieces.segments))

        piece_rows = rows_of(pieces)
        numbers = index.rows["number"]
        return cls(
            pieces=pieces,
            frame_pieces=frame_pieces,
            digests=episodes["digest"],
            tail_returns=piece_rows["tail_return"],
            piece_numbers=piece_rows["number"],
            frame_numbers=(rows_of(frame_pieces) if future_steps else piece_rows)["number"],
            oldest=int(numbers[0]),
            newest=int(numbers[-1]),
            numbers=np.ascontiguousarray(rows["number"]),
            completions=np.ascontiguousarray(episodes["completion"]),
            row_lengths=rows["length"].astype(np.int64),
            episode_lengths=lengths,
            success=episodes["success"].astype(bool),
            policy_versions=np.ascontiguousarray(rows["policy_version"]),
            completed_at_s=episodes["completed_at_s"],
            sources=episodes["source"].tolist(),
            tasks=[index.tasks.by_number[n] for n in episodes["task"].tolist()],
            instructions=[index.instructions.by_number[n] for n in episodes["instruction"].tolist()],
            weights=drawn.weights,
        )
