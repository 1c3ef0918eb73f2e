"""What a member of the zoo trains on: one batch of windows as torch tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.core.types import Array, Batch
from vla_dist.models.actions import ActionCodec
from vla_dist.models.conditioning import ReturnConditioning


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainBatch:
    """B windows of T steps; P proprio, A action, G goal dimensions."""

    states: Tensor
    """(B, T, P) float32, raw units: the model normalises them."""
    actions: Tensor
    """(B, T, A) float32, executed, in [-1, 1] or one-hot."""
    target_actions: Tensor
    """(B, T, A) float32, to imitate, in [-1, 1] or one-hot."""
    returns_to_go: Tensor
    """(B, T) float32, scaled by the conditioning; zeros where it is ``none``."""
    timesteps: Tensor
    """(B, T) int64."""
    padding_mask: Tensor
    """(B, T) bool, True = valid."""
    goals: Tensor | None = None
    """(B, G) float32 sentence embeddings."""
    images: Mapping[str, Tensor] = field(default_factory=dict)
    """camera name -> (B, T, 3, H, W) uint8."""

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

    @property
    def num_windows(self) -> int:
        return len(self.states)


def to_train_batch(
    batch: Batch,
    *,
    codec: ActionCodec,
    conditioning: ReturnConditioning,
    max_episode_steps: int,
    goals: Array | None,
    num_steps: int,
    cameras: tuple[str, ...] = (),
) -> TrainBatch:
    """A replay batch as tensors, actions encoded and returns conditioned; padded steps hold zeros.

    Args:
        goals: (B, G) float32, one embedding a window; None for a model without language.
        num_steps: T, the last steps of each window to keep: as many as the policy will remember.
        cameras: the views to keep.

    Raises:
        ConfigError: the windows are shorter than T, so the policy would act on contexts that it never trained on.
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
    return TrainBatch(
        states=tensors["proprio"],
        actions=tensors["actions"],
        target_actions=tensors["target_actions"],
        returns_to_go=tensors["returns_to_go"],
        timesteps=torch.from_numpy(np.where(mask, batch.timesteps[:, -num_steps:], 0).astype(np.int64)),
        padding_mask=torch.from_numpy(mask.copy()),
        goals=None if goals is None else torch.from_numpy(np.array(goals, np.float32)),
        images={
            name: torch.from_numpy(np.array(batch.images[name][:, -num_steps:])).permute(0, 1, 4, 2, 3)
            for name in cameras
        },
    )


def _padded_with_zeros(name: str, column: Array, mask: Array) -> Tensor:
    keep = mask if column.ndim == 2 else mask[..., None]
    clean = np.where(keep, column, 0).astype(np.float32)
    if not np.isfinite(clean).all():
        rows = np.unique(np.argwhere(~np.isfinite(clean))[:, 0])[:8].tolist()
        raise DataError(f"column {name!r} of windows {rows} is not finite at valid steps; remove those episodes")
    return torch.from_numpy(clean)
