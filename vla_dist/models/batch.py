"""What a member of the zoo trains on: one batch of windows as torch tensors.

Shapes: B windows, K context steps, H chunk horizon, P proprio, A action, G goal.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.core.types import Array, Batch
from vla_dist.models.actions import ActionCodec
from vla_dist.models.conditioning import ReturnConditioning


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainBatch:
    """B windows of K steps, the newest step last, and the targets of the H steps that begin with it."""

    states: Tensor
    """(B, K, P) float32, raw units: the model normalises them."""
    actions: Tensor
    """(B, K, A) float32, executed, in [-1, 1] or one-hot."""
    target_actions: Tensor
    """(B, K, A) float32, to imitate, in [-1, 1] or one-hot."""
    returns_to_go: Tensor
    """(B, K) float32, scaled by the conditioning; zeros where it is ``none``."""
    timesteps: Tensor
    """(B, K) int64."""
    padding_mask: Tensor
    """(B, K) bool, True = valid. The newest step always is."""
    target_chunks: Tensor
    """(B, H, A) float32, to imitate from the newest step on: the first row is ``target_actions[:, -1]``."""
    chunk_mask: Tensor
    """(B, H) bool, True where the episode still had that step; elsewhere the targets are zeros."""
    instructions: tuple[str, ...]
    """(B,) the words each window is trained with."""
    tasks: tuple[str, ...]
    """(B,) machine names."""
    success: Tensor
    """(B,) bool, of the whole episode."""
    interventions: Tensor
    """(B, K) bool, a person had taken over."""
    weights: Tensor | None = None
    """(B,) float32, how much each window counts in the loss; None: all alike."""
    step_weights: Tensor | None = None
    """(B, K) float32, how much each step counts on top of that; None: all alike."""
    steps_left: Tensor | None = None
    """(B,) int64, steps of the episode after the newest one; None where unknown."""
    policy_versions: Tensor | None = None
    """(B,) int64, that acted; 0 for an expert or a person."""
    episodes: Tensor | None = None
    """(B,) int64, identity of each window's episode in the replay."""
    stored_state: Mapping[str, Tensor] = field(default_factory=dict)
    """What the learner kept of a recurrent model's state just before these windows, (B, ...) each."""
    goals: Tensor | None = None
    """(B, G) float32 sentence embeddings."""
    images: Mapping[str, Tensor] = field(default_factory=dict)
    """camera name -> (B, K, 3, H, W) uint8."""
    items: tuple[int, ...] = ()
    """B identities of the replay's segments in which the windows end; empty where unknown."""

    def rows(self, start: int, stop: int) -> "TrainBatch":
        """The windows ``start`` to ``stop`` (not included), without a copy."""

        def cut(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: cut(image) for name, image in value.items()}
            return value if value is None else value[start:stop]

        return TrainBatch(**{one.name: cut(getattr(self, one.name)) for one in fields(self)})

    def to(self, device: torch.device | str) -> "TrainBatch":
        """The same batch on another device; the copy overlaps where the source is pinned."""
        moved = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Tensor):
                value = value.to(device, non_blocking=True)
            elif isinstance(value, Mapping):
                value = {name: image.to(device, non_blocking=True) for name, image in value.items()}
            moved[one.name] = value
        return TrainBatch(**moved)

    def pinned(self) -> "TrainBatch":
        """The same batch in memory that a GPU reads by itself, so that ``to`` need not wait."""

        def pin(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: pin(image) for name, image in value.items()}
            return value.pin_memory() if isinstance(value, Tensor) else value

        return TrainBatch(**{one.name: pin(getattr(self, one.name)) for one in fields(self)})

    @property
    def num_windows(self) -> int:
        return len(self.states)

    @property
    def weights_of_steps(self) -> Tensor | None:
        """(B, K) or (B,), for losses of every step; None: all alike."""
        if self.step_weights is None or self.weights is None:
            return self.weights if self.step_weights is None else self.step_weights
        return self.weights[:, None] * self.step_weights

    @property
    def weights_of_newest(self) -> Tensor | None:
        """(B,), for losses of the chunk that begins with the newest step; None: all alike."""
        weights = self.weights_of_steps
        return weights[:, -1] if weights is not None and weights.ndim == 2 else weights


def to_train_batch(
    batch: Batch,
    *,
    codec: ActionCodec,
    conditioning: ReturnConditioning,
    max_episode_steps: int,
    goals: Array | None,
    num_steps: int,
    horizon: int = 1,
    cameras: tuple[str, ...] = (),
    instructions: Sequence[str] | None = None,
    step_weights: Array | None = None,
) -> TrainBatch:
    """A replay batch as tensors, actions encoded and returns conditioned; padded steps hold zeros.

    Args:
        goals: (B, G) float32, one embedding a window; None for a model without language.
        num_steps: K, the last steps of each window to keep: as many as the policy will remember.
        horizon: H.
        cameras: the views to keep.
        instructions: B wordings in place of those that the episodes were run with.
        step_weights: (B, at least K) float32, how much each step counts; None: all alike.

    Raises:
        ConfigError: the windows are shorter than K, so the policy would act on contexts that it never trained on; or
            the replay gives fewer than H - 1 steps of the future.
        DataError: a camera is missing, or a valid step is not finite.
    """
    if batch.timesteps.shape[1] < num_steps:
        raise ConfigError(
            f"the replay gives windows of {batch.timesteps.shape[1]} steps but the model's context_steps is "
            f"{num_steps}; make the windows longer or the context shorter"
        )
    missing = [name for name in cameras if name not in batch.images]
    if missing:
        held = ", ".join(sorted(batch.images)) or "no images"
        raise DataError(f"the batch lacks cameras {missing}; it holds {held}. Record them or train without them")
    mask = np.asarray(batch.padding_mask, bool)[:, -num_steps:]
    columns = {
        "proprio": batch.proprio,
        "actions": codec.encode(batch.actions),
        "target_actions": codec.encode(batch.target_actions),
        "returns_to_go": conditioning.training_values(batch, max_episode_steps=max_episode_steps),
    }
    tensors = {name: _padded_with_zeros(name, column[:, -num_steps:], mask) for name, column in columns.items()}
    chunks, chunk_mask = _target_chunks(batch, codec, horizon)
    interventions = np.zeros(mask.shape, bool) if batch.interventions is None else batch.interventions[:, -num_steps:]
    return TrainBatch(
        states=tensors["proprio"],
        actions=tensors["actions"],
        target_actions=tensors["target_actions"],
        returns_to_go=tensors["returns_to_go"],
        timesteps=torch.from_numpy(np.where(mask, batch.timesteps[:, -num_steps:], 0).astype(np.int64)),
        padding_mask=torch.from_numpy(mask.copy()),
        target_chunks=chunks,
        chunk_mask=chunk_mask,
        instructions=batch.instructions if instructions is None else tuple(instructions),
        tasks=batch.tasks,
        success=torch.from_numpy(np.array(batch.success, bool)),
        interventions=torch.from_numpy(interventions & mask),
        weights=None if batch.weights is None else torch.from_numpy(np.array(batch.weights, np.float32)),
        step_weights=None if step_weights is None else torch.from_numpy(step_weights[:, -num_steps:].copy()),
        steps_left=torch.from_numpy(np.asarray(batch.episode_lengths - 1 - batch.timesteps[:, -1], np.int64)),
        policy_versions=torch.from_numpy(np.array(batch.policy_versions, np.int64)),
        episodes=None if batch.episodes is None else torch.from_numpy(np.array(batch.episodes, np.int64)),
        goals=None if goals is None else torch.from_numpy(np.array(goals, np.float32)),
        images={
            name: torch.from_numpy(np.array(batch.images[name][:, -num_steps:])).permute(0, 1, 4, 2, 3)
            for name in cameras
        },
        items=() if batch.items is None else tuple(int(item) for item in batch.items),
    )


def _target_chunks(batch: Batch, codec: ActionCodec, horizon: int) -> tuple[Tensor, Tensor]:
    """(B, H, A) float32 and (B, H) bool, from the newest step of each window on."""
    targets, mask = batch.target_actions[:, -1:], np.asarray(batch.padding_mask, bool)[:, -1:]
    if horizon > 1:
        future, future_mask = batch.future_target_actions, batch.future_mask
        held = 0 if future is None else future.shape[1]
        if future is None or future_mask is None or held < horizon - 1:
            raise ConfigError(
                f"the replay gives the targets of {held} steps after each window but the model's horizon is {horizon}; "
                f"set the buffer's future_steps to {horizon - 1}"
            )
        targets = np.concatenate([targets, future[:, : horizon - 1]], 1)
        mask = np.concatenate([mask, np.asarray(future_mask, bool)[:, : horizon - 1]], 1)
    return _padded_with_zeros("target_actions", codec.encode(targets), mask), torch.from_numpy(mask.copy())


def _padded_with_zeros(name: str, column: Array, mask: Array) -> Tensor:
    keep = mask if column.ndim == 2 else mask[..., None]
    clean = np.where(keep, column, 0).astype(np.float32)
    if not np.isfinite(clean).all():
        rows = np.unique(np.argwhere(~np.isfinite(clean))[:, 0])[:8].tolist()
        raise DataError(f"column {name!r} of windows {rows} is not finite at valid steps; remove those episodes")
    return torch.from_numpy(clean)
