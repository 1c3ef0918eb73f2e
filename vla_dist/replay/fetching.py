"""From drawn steps to a batch: which bytes to ask for, and how they become arrays.

A window costs its own steps and frames, not whole segments. Payloads are never overwritten, only removed, so what comes
back is whole or missing.

Dimensions: B windows, K context steps, F future steps, T segment steps, N pieces.
"""

import math

import numpy as np

from vla_dist.core.types import SOURCES, Array, Batch
from vla_dist.data.segment_codec import SegmentCodec
from vla_dist.replay.keys import Keys
from vla_dist.replay.link import Deadline, RedisLink
from vla_dist.replay.range_requests import RangeRequests
from vla_dist.replay.recycling import RecycledMemory
from vla_dist.replay.step_fetching import StepFetcher
from vla_dist.replay.window_plan import WindowPlan


class WindowFetcher:
    """Fetches the windows of one buffer; threads may share it."""

    def __init__(
        self,
        link: RedisLink,
        images: RedisLink,
        codec: SegmentCodec,
        keys: Keys,
        *,
        context_steps: int,
        cache_bytes: int,
    ) -> None:
        """``link`` leads to the rows, ``images`` to the frames; they may be the same."""
        self._images = images
        self._codec = codec
        self._keys = keys
        self._context_steps = context_steps
        self._memory = RecycledMemory()
        self._steps = StepFetcher(link, codec, keys, self._memory, cache_bytes=cache_bytes)
        self._frames = [
            RangeRequests(
                f"{keys.prefix}image:", f":{number}", offset=0, stride=image.frame_bytes, num_steps=codec.num_steps
            )
            for number, image in enumerate(codec.image_codecs.values())
        ]

    def fetch(self, plan: WindowPlan, deadline: Deadline, *, now_s: float) -> tuple[Batch, Array]:
        """The batch, and (B,) bool, windows of which something was evicted meanwhile: those hold anything."""
        pieces, layout = plan.pieces, self._codec.layout
        steps, missing = self._steps.fetch(plan, deadline)
        gone = np.zeros(len(plan.numbers), bool)
        gone[pieces.windows[missing]] = True
        images = {}
        for number, camera in enumerate(self._codec.spec.cameras):
            fetch = self._fetch_raw if self._codec.image_codecs[camera.name].is_raw else self._fetch_packed
            images[camera.name] = fetch(plan, number, gone, deadline)
        tails = pieces.arrange(np.repeat(plan.tail_returns, pieces.counts))
        with np.errstate(invalid="ignore", over="ignore"):  # The steps of windows that are gone are any numbers.
            own = steps[..., layout.segment_return].astype(np.float64) + steps[..., layout.segment_return + 1]
            returns_to_go = (tails + own).astype(np.float32)
        # Of the future only what is to be imitated, and who acts, is of use.
        future = future_interventions = None
        if pieces.padding_mask.shape[1] > self._context_steps:
            future = steps[:, self._context_steps :, layout.target_actions]
            future_interventions = steps[:, self._context_steps :, layout.intervention] != 0
            steps, returns_to_go = steps[:, : self._context_steps], returns_to_go[:, : self._context_steps]
        batch = Batch(
            proprio=steps[..., layout.proprio],
            actions=steps[..., layout.actions],
            target_actions=steps[..., layout.target_actions],
            rewards=steps[..., layout.reward],
            interventions=steps[..., layout.intervention] != 0,
            returns_to_go=returns_to_go,
            timesteps=pieces.timesteps[:, : self._context_steps],
            padding_mask=pieces.padding_mask[:, : self._context_steps],
            future_target_actions=future,
            future_interventions=future_interventions,
            future_mask=None if future is None else pieces.padding_mask[:, self._context_steps :],
            episode_lengths=plan.episode_lengths,
            success=plan.success,
            policy_versions=plan.policy_versions,
            instructions=tuple(plan.instructions),
            tasks=tuple(plan.tasks),
            sources=tuple(SOURCES[source] for source in plan.sources),
            images=images,
            ages_s=np.maximum(0.0, now_s - plan.completed_at_s),
            items=plan.numbers,
            weights=plan.weights,
        )
        return batch, gone

    def _fetch_raw(self, plan: WindowPlan, camera: int, gone: Array, deadline: Deadline) -> Array:
        """(B, K, H, W, 3) uint8, received where it belongs; zero where padded."""
        pieces, spec = plan.frame_pieces, self._codec.spec.cameras[camera]
        codec = self._codec.image_codecs[spec.name]
        shape = (len(plan.numbers), self._context_steps, *codec.frame_shape)
        frames = self._memory.take(math.prod(shape)).reshape(shape)
        for window in np.flatnonzero(pieces.num_valid < self._context_steps).tolist():
            frames[window, : self._context_steps - int(pieces.num_valid[window])] = 0
        flat = frames.reshape(-1).data
        ends = pieces.segments * self._codec.num_steps + pieces.firsts + pieces.counts
        last = pieces.timesteps[pieces.windows, -1] + 1
        positions = pieces.windows * self._context_steps + self._context_steps - (last - ends) - pieces.counts
        targets = [
            flat[start : start + length]
            for start, length in zip(
                (positions * codec.frame_bytes).tolist(), (pieces.counts * codec.frame_bytes).tolist(), strict=True
            )
        ]
        digests = plan.digests[pieces.windows].tolist()
        request = self._frames[camera].pack(digests, pieces.segments, pieces.firsts, pieces.counts)
        taken = np.array(self._images.bulks_into(request, targets, timeout_s=deadline.left_s))
        gone[pieces.windows[~taken]] = True
        return frames

    def _fetch_packed(self, plan: WindowPlan, camera: int, gone: Array, deadline: Deadline) -> Array:
        """The same from compressed frames: each touched segment comes once and whole."""
        pieces, spec = plan.frame_pieces, self._codec.spec.cameras[camera]
        codec = self._codec.image_codecs[spec.name]
        frames = np.zeros((len(plan.numbers), self._context_steps, *codec.frame_shape), np.uint8)
        names = [
            self._keys.image(digest.decode(), segment, camera)
            for digest, segment in zip(plan.digests[pieces.windows].tolist(), pieces.segments.tolist(), strict=True)
        ]
        distinct = list(dict.fromkeys(names))
        values = self._images.call([("GET", name) for name in distinct], timeout_s=deadline.left_s)
        stored = dict(zip(distinct, values, strict=True))
        filled = np.zeros(len(plan.numbers), np.int64)
        for number, name in enumerate(names):
            window, count = int(pieces.windows[number]), int(pieces.counts[number])
            data = stored[name]
            if data is None:
                gone[window] = True
                continue
            first = int(pieces.firsts[number])
            # Only the table of frames is needed to find some of them; how many there are is its own length.
            start = self._context_steps - int(pieces.num_valid[window]) + int(filled[window])
            num_frames = self._frames_of(plan, window, int(pieces.segments[number]))
            frames[window, start : start + count] = codec.unpack(data, num_frames, first, count)
            filled[window] += count
        return frames

    def _frames_of(self, plan: WindowPlan, window: int, segment: int) -> int:
        """Frames of a segment: T, or what is left for the last one."""
        num_steps = self._codec.num_steps
        return min(num_steps, int(plan.episode_lengths[window]) - segment * num_steps)
