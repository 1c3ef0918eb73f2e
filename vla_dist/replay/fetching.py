"""From drawn steps to a batch: which bytes to ask for, and how they become arrays.

A window costs its own steps and frames, not whole segments. Payloads are never overwritten, only removed, so what comes
back is whole or missing.

Dimensions: B windows, K context steps, F future steps, T segment steps, N pieces.
"""

import numpy as np

from vla_dist.core.types import SOURCES, Array, Batch
from vla_dist.data.segment_codec import SegmentCodec
from vla_dist.replay.frame_fetching import FrameFetcher
from vla_dist.replay.keys import Keys
from vla_dist.replay.link import Deadline, RedisLink
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
        self._codec = codec
        self._context_steps = context_steps
        memory = RecycledMemory()
        # Rows are small beside frames: kept first, they are worth the most by the byte.
        for_frames = cache_bytes * 7 // 8 if codec.image_codecs else 0
        self._steps = StepFetcher(link, codec, keys, memory, cache_bytes=cache_bytes - for_frames)
        row_frames = sum(image.frame_bytes for image in codec.image_codecs.values())
        self._frames = {
            name: FrameFetcher(
                images, codec, keys, memory, camera=number, cache_bytes=for_frames * image.frame_bytes // row_frames
            )
            for number, (name, image) in enumerate(codec.image_codecs.items())
        }

    def fetch(self, plan: WindowPlan, deadline: Deadline, *, now_s: float) -> tuple[Batch, Array]:
        """The batch, and (B,) bool, windows of which something was evicted meanwhile: those hold anything."""
        pieces, layout = plan.pieces, self._codec.layout
        steps, missing = self._steps.fetch(plan, deadline)
        gone = np.zeros(len(plan.numbers), bool)
        gone[pieces.windows[missing]] = True
        images = {}
        for camera, fetcher in self._frames.items():
            images[camera], missing = fetcher.fetch(plan, deadline)
            gone[plan.frame_pieces.windows[missing]] = True
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
            episodes=plan.completions,
            weights=plan.weights,
        )
        return batch, gone
