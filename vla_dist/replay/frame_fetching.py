"""The frames of windows: out of the reader's own memory where they were fetched before, else from the server.

Dimensions: B windows, K context steps, N pieces, T segment steps.
"""

import math
from collections.abc import Sequence

import numpy as np

from vla_dist.core.types import Array
from vla_dist.data.segment_codec import SegmentCodec
from vla_dist.replay.frame_cache import FrameCache
from vla_dist.replay.keys import Keys
from vla_dist.replay.link import Deadline, RedisLink
from vla_dist.replay.range_requests import RangeRequests
from vla_dist.replay.recycling import RecycledMemory
from vla_dist.replay.window_plan import WindowPlan


class FrameFetcher:
    """Fetches the frames of one camera; threads may share it."""

    def __init__(
        self, link: RedisLink, codec: SegmentCodec, keys: Keys, memory: RecycledMemory, *, camera: int, cache_bytes: int
    ) -> None:
        """``camera`` counts those of the spec, ``memory`` is for what is given out, ``cache_bytes`` are kept."""
        self._link = link
        self._keys = keys
        self._memory = memory
        self._camera = camera
        self._num_steps = codec.num_steps
        self._codec = codec.image_codecs[codec.spec.cameras[camera].name]
        self._cache = FrameCache(codec.num_steps, self._codec.frame_bytes, max_bytes=cache_bytes)
        self._requests = RangeRequests(
            f"{keys.prefix}image:",
            f":{camera}",
            offset=0,
            stride=self._codec.frame_bytes,
            num_steps=codec.num_steps,
        )

    def fetch(self, plan: WindowPlan, deadline: Deadline) -> tuple[Array, Array]:
        """(B, K, H, W, 3) uint8, zero where padded, and (N,) bool, pieces that the server lacks.

        Those hold anything.
        """
        pieces = plan.frame_pieces
        shape = (*pieces.padding_mask.shape, self._codec.frame_bytes)
        frames = self._memory.take(math.prod(shape)).reshape(shape)
        for window in np.flatnonzero(~pieces.padding_mask.all(axis=1)).tolist():
            frames[window][~pieces.padding_mask[window]] = 0
        targets = self._targets(plan, frames.reshape(-1, self._codec.frame_bytes))
        stamps = plan.completed_at_s[pieces.windows]
        with self._cache.lock:
            found = self._cache.find(plan.frame_numbers, stamps, pieces.firsts, pieces.counts)
            for target, kept in zip(targets, found, strict=True):
                if kept is not None:
                    target[:] = kept
        absent = np.array([number for number, kept in enumerate(found) if kept is None], np.int64)
        missing = np.zeros(len(targets), bool)
        if len(absent):
            fetch = self._fetch_raw if self._codec.is_raw else self._fetch_packed
            received = [targets[number] for number in absent]
            missing[absent] = fetch(plan, absent, received, deadline)
            there = np.flatnonzero(~missing[absent])
            kept = absent[there]
            with self._cache.lock:
                self._cache.keep(
                    plan.frame_numbers[kept],
                    stamps[kept],
                    pieces.firsts[kept],
                    [received[number] for number in there],
                    oldest=plan.oldest,
                    newest=plan.newest,
                )
        return frames.reshape(*shape[:2], *self._codec.frame_shape), missing

    def _targets(self, plan: WindowPlan, frames: Array) -> list[Array]:
        """(count, bytes) of each piece within (B * K, bytes) ``frames``."""
        pieces = plan.frame_pieces
        ends = pieces.segments * self._num_steps + pieces.firsts + pieces.counts
        after = pieces.timesteps[pieces.windows, -1] + 1 - ends
        stops = (pieces.windows + 1) * pieces.padding_mask.shape[1] - after
        return [frames[s - n : s] for s, n in zip(stops.tolist(), pieces.counts.tolist(), strict=True)]

    def _fetch_raw(self, plan: WindowPlan, wanted: Array, targets: Sequence[Array], deadline: Deadline) -> Array:
        """Frames of the pieces ``wanted``, received where they belong; bool, which of them the server lacks."""
        pieces = plan.frame_pieces
        digests = plan.digests[pieces.windows[wanted]].tolist()
        request = self._requests.pack(digests, pieces.segments[wanted], pieces.firsts[wanted], pieces.counts[wanted])
        views = [target.reshape(-1).data for target in targets]
        return ~np.array(self._link.bulks_into(request, views, timeout_s=deadline.left_s))

    def _fetch_packed(self, plan: WindowPlan, wanted: Array, targets: Sequence[Array], deadline: Deadline) -> Array:
        """The same from compressed frames: each touched segment comes once and whole."""
        pieces = plan.frame_pieces
        windows, segments = pieces.windows[wanted], pieces.segments[wanted]
        names = [
            self._keys.image(digest.decode(), segment, self._camera)
            for digest, segment in zip(plan.digests[windows].tolist(), segments.tolist(), strict=True)
        ]
        distinct = list(dict.fromkeys(names))
        values = self._link.call([("GET", name) for name in distinct], timeout_s=deadline.left_s)
        stored = dict(zip(distinct, values, strict=True))
        # Frames of a segment: T, or what is left for the last one.
        lengths = np.minimum(self._num_steps, plan.episode_lengths[windows] - segments * self._num_steps).tolist()
        missing = np.zeros(len(wanted), bool)
        for number, (name, length, first) in enumerate(
            zip(names, lengths, pieces.firsts[wanted].tolist(), strict=True)
        ):
            data, target = stored[name], targets[number]
            if data is None:
                missing[number] = True
            else:
                target[:] = self._codec.unpack(data, length, first, len(target)).reshape(target.shape)
        return missing
