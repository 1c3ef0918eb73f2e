"""The steps of windows: out of the reader's own memory where they were fetched before, else from the server.

Dimensions: B windows, W steps of a window, N pieces, T segment steps, D numbers of a step.
"""

import numpy as np

from vla_dist.core.types import Array
from vla_dist.data.segment_codec import SegmentCodec
from vla_dist.replay.keys import Keys
from vla_dist.replay.link import Deadline, RedisLink
from vla_dist.replay.range_requests import RangeRequests
from vla_dist.replay.recycling import RecycledMemory
from vla_dist.replay.row_cache import RowCache
from vla_dist.replay.window_plan import WindowPlan
from vla_dist.replay.wire import BulkLayout


class StepFetcher:
    """Fetches the steps of windows of one buffer; threads may share it."""

    def __init__(
        self, link: RedisLink, codec: SegmentCodec, keys: Keys, memory: RecycledMemory, *, cache_bytes: int
    ) -> None:
        """``memory`` is for what is given out, ``cache_bytes`` at most are kept for later."""
        self._link = link
        self._codec = codec
        self._memory = memory
        self._num_columns = codec.layout.num_columns
        self._cache = RowCache(codec.num_steps, self._num_columns, max_bytes=cache_bytes)
        self._requests = RangeRequests(
            f"{keys.prefix}row:", "", offset=codec.steps_offset, stride=codec.step_bytes, num_steps=codec.num_steps
        )

    def fetch(self, plan: WindowPlan, deadline: Deadline) -> tuple[Array, Array]:
        """(B, W, D) float32 steps, zero where padded, and (N,) bool, pieces that the server lacks.

        Those hold anything.
        """
        pieces = plan.pieces
        size = pieces.padding_mask.size
        steps = self._memory.take(size * self._codec.step_bytes).view("<f4").reshape(size, self._num_columns)
        others = np.ones(len(pieces.windows), bool)
        if self._cache.holds_rows:
            stamps = plan.completed_at_s[pieces.windows]
            held = self._copy(plan, stamps, steps, only_if_all=True)
            if not held.all():
                self._load(plan, stamps, np.flatnonzero(~held), deadline)
                held = self._copy(plan, stamps, steps, only_if_all=False)
            others = ~held
        missing = np.zeros(len(others), bool)
        if others.any():
            missing[others] = self._receive(plan, others, steps, deadline)
        shaped = steps.reshape(*pieces.padding_mask.shape, self._num_columns)
        if not pieces.is_full:
            shaped[~pieces.padding_mask] = 0
        return shaped, missing

    def _load(self, plan: WindowPlan, stamps: Array, absent: Array, deadline: Deadline) -> None:
        """Fetch the rows of the pieces ``absent``, whole, if they have a place in the cache."""
        with self._cache.lock:
            numbers, chosen = np.unique(plan.piece_numbers[absent], return_index=True)
            admitted = self._cache.admits(numbers, oldest=plan.oldest, newest=plan.newest)
        wanted = absent[chosen[admitted]]
        if not len(wanted):
            return
        num_steps = self._codec.num_steps
        whole = np.full(len(wanted), num_steps)
        arena, starts = self._bulks(plan, wanted, np.zeros_like(whole), whole, deadline)
        there = starts >= 0
        rows = _records(arena, num_steps * self._codec.step_bytes)[starts[there]].view("<f4")
        kept = wanted[there]
        with self._cache.lock:
            self._cache.put(plan.piece_numbers[kept], stamps[kept], rows.reshape(-1, num_steps, self._num_columns))

    def _copy(self, plan: WindowPlan, stamps: Array, steps: Array, *, only_if_all: bool) -> Array:
        """Fill ``steps`` (B * W, D) from the cache; (N,) bool, pieces that it holds."""
        pieces = plan.pieces
        with self._cache.lock:
            slots, held = self._cache.find(plan.piece_numbers, stamps)
            if held.all() or not only_if_all:
                # The rows of an episode have slots side by side and all but its last are full, so a window is one run
                # of steps, which may begin before the episode: padding, as what is not held, is dealt with later.
                num, width = pieces.padding_mask.shape
                first = np.searchsorted(pieces.windows, np.arange(num))
                starts = slots[first] * self._codec.num_steps + pieces.firsts[first]
                places = (starts - pieces.padding_mask.argmax(axis=1))[:, None] + np.arange(width)
                # Beyond the last slot comes the first one; and with "raise" NumPy would gather into memory of its own.
                np.take(self._cache.steps, places.ravel(), axis=0, out=steps, mode="wrap")
        return held

    def _receive(self, plan: WindowPlan, others: Array, steps: Array, deadline: Deadline) -> Array:
        """Fill in the steps of the pieces ``others`` (N,) bool; of those, bool, which the server lacks."""
        pieces, size = plan.pieces, self._codec.step_bytes
        wanted = np.flatnonzero(others)
        counts = pieces.counts[wanted]
        arena, starts = self._bulks(plan, wanted, pieces.firsts[wanted], counts, deadline)
        missing = starts < 0
        places = _counted_from(np.where(missing, 0, starts), counts, each=size)
        received = _records(arena, size)[places].view("<f4").reshape(-1, self._num_columns)
        steps[pieces.arrange(np.repeat(others, pieces.counts)).ravel()] = received
        return missing

    def _bulks(
        self, plan: WindowPlan, wanted: Array, firsts: Array, counts: Array, deadline: Deadline
    ) -> tuple[Array, Array]:
        """Received bytes of ranges in the segments of the pieces ``wanted``, and where each starts in them, or -1."""
        layout = BulkLayout(counts * self._codec.step_bytes)
        digests = plan.digests[plan.pieces.windows[wanted]].tolist()
        request = self._requests.pack(digests, plan.pieces.segments[wanted], firsts, counts)
        return self._link.bulks(request, layout, self._memory.take(layout.num_bytes), timeout_s=deadline.left_s)


def _records(arena: Array, size: int) -> Array:
    """Records of ``size`` bytes that may start at any byte: replies have headers of any length between them."""
    return np.ndarray((len(arena) - size + 1,), np.dtype((np.void, size)), arena, strides=(1,))


def _counted_from(starts: Array, counts: Array, *, each: int = 1) -> Array:
    """start, start + each, ..., as many as the count says, of each of N one after the other."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before * each, counts) + np.arange(int(counts.sum())) * each
