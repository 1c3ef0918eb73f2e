"""From packed draws and fetched rows to a batch: pure functions on arrays.

Dimensions: B windows, K context steps, N fetched rows, T segment steps, M segments that one window can touch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vla_dist.core.errors import IntegrityError
from vla_dist.core.types import SOURCES, Array, Batch
from vla_dist.data.returns import returns_to_go
from vla_dist.data.windows import WindowIndex


def draw_dtype(span: int) -> np.dtype:
    """What the ``draw`` function packs per window; ``span`` is M."""
    return np.dtype(
        [
            ("episode_id", "S64"),
            ("offset", "<u4"),
            ("segment_index", "<u4"),
            ("episode_length", "<u4"),
            ("success", "u1"),
            ("source", "u1"),
            ("policy_version", "<f8"),
            ("inserted_at_s", "<f8"),
            ("segments", [("slot", "<i4"), ("tail_return", "<f8")], (span,)),
        ]
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DrawnSlots:
    """The distinct slots that a set of draws touches."""

    slots: Array
    """(N,) int32, ascending."""
    tail_returns: Array
    """(N,) float64, reward that the episode still collects after each slot's segment."""
    window_rows: Array
    """(B, M) int64 row of each segment a window touches, the last rightmost; -1 where not needed."""

    @classmethod
    def of(cls, draws: Array) -> "DrawnSlots":
        segments = draws["segments"]
        slots, first, inverse = np.unique(segments["slot"], return_index=True, return_inverse=True)
        rows = inverse.reshape(segments.shape).astype(np.int64)
        tails = segments["tail_return"].reshape(-1)[first]
        if slots[0] < 0:
            # -1 sorts first and stands for "not needed".
            slots, tails, rows = slots[1:], tails[1:], rows - 1
        return cls(slots=slots, tail_returns=tails, window_rows=rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameRange:
    """Consecutive frames of one segment that belong to one window."""

    window: int
    slot: int
    first: int
    """Offset within the segment."""
    last: int
    """Inclusive."""
    position: int
    """Where in the window, 0..K-1, the first frame goes."""


def frame_ranges(draws: Array, *, context_steps: int, num_steps: int) -> list[FrameRange]:
    """Which frames to fetch, so that a window costs its own frames and not whole segments."""
    span = draws["segments"].shape[1]
    ranges = []
    for window, draw in enumerate(draws):
        end = int(draw["segment_index"]) * num_steps + int(draw["offset"])
        start = max(0, end - context_steps + 1)
        for column in range(span):
            slot = int(draw["segments"]["slot"][column])
            segment_start = (int(draw["segment_index"]) - (span - 1 - column)) * num_steps
            first, last = max(start, segment_start), min(end, segment_start + num_steps - 1)
            if slot >= 0 and first <= last:
                ranges.append(
                    FrameRange(
                        window=window,
                        slot=slot,
                        first=first - segment_start,
                        last=last - segment_start,
                        position=first - end + context_steps - 1,
                    )
                )
    return ranges


def place_frames(ranges: list[FrameRange], frames: list[bytes], shape: tuple[int, ...]) -> Array:
    """Fetched byte ranges to (B, K, H, W, 3) uint8, zero where padded. Raises IntegrityError on a wrong size."""
    windows = np.zeros(shape, np.uint8)
    frame_bytes = int(np.prod(shape[2:]))
    for span, data in zip(ranges, frames, strict=True):
        count = span.last - span.first + 1
        if len(data) != count * frame_bytes:
            raise IntegrityError(
                f"slot {span.slot} gave {len(data)} image bytes, expected {count} frames of {frame_bytes}; was it "
                "written with another camera size? Use another table name"
            )
        windows[span.window, span.position : span.position + count] = np.frombuffer(data, np.uint8).reshape(
            count, *shape[2:]
        )
    return windows


def replaced(draws: Array, drawn: DrawnSlots, rows: Array, present: Array) -> Array:
    """(B,) bool, windows of which a slot was emptied or given to another segment since the draw.

    Args:
        draws: (B,) as packed by the server.
        drawn: their slots.
        rows: (N,) structured rows; rows that were missing may hold anything.
        present: (N,) bool, whether the slot held a row.
    """
    span = drawn.window_rows.shape[1]
    wanted = draws["segment_index"].astype(np.int64)[:, None] - np.arange(span - 1, -1, -1)
    # Column first: indexing whole records would copy every row.
    same = (
        present[drawn.window_rows]
        & (rows["episode_id"][drawn.window_rows] == draws["episode_id"][:, None])
        & (rows["segment_index"][drawn.window_rows] == wanted)
    )
    return ~(same | (drawn.window_rows < 0)).all(axis=1)


def assemble(
    draws: Array,
    drawn: DrawnSlots,
    rows: Array,
    *,
    context_steps: int,
    num_steps: int,
    now_s: float,
    images: Mapping[str, Array],
) -> Batch:
    """The batch of B windows whose segments are the (N,) structured ``rows``."""
    index = WindowIndex.ending_at(
        window_rows=drawn.window_rows,
        segment_indices=draws["segment_index"],
        offsets=draws["offset"],
        context_steps=context_steps,
        num_steps=num_steps,
    )
    to_go = returns_to_go(rows["rewards"], lengths=rows["length"], tail_returns=drawn.tail_returns)
    ends = drawn.window_rows[:, -1]
    return Batch(
        proprio=index.gather(rows["proprio"]),
        actions=index.gather(rows["actions"]),
        target_actions=index.gather(rows["target_actions"]),
        rewards=index.gather(rows["rewards"]),
        returns_to_go=index.gather(to_go.astype(np.float32)),
        timesteps=index.timesteps,
        padding_mask=index.padding_mask,
        episode_lengths=draws["episode_length"].astype(np.int64),
        success=draws["success"].astype(bool),
        policy_versions=draws["policy_version"].astype(np.int64),
        instructions=tuple(text.decode() for text in rows["instruction"][ends].tolist()),
        tasks=tuple(text.decode() for text in rows["task"][ends].tolist()),
        sources=tuple(SOURCES[i] for i in draws["source"].tolist()),
        images=images,
        ages_s=np.maximum(0.0, now_s - draws["inserted_at_s"]),
    )
