"""Training windows of noise that fit a member's config, for tests and benchmarks of models."""

import numpy as np
import torch

from vla_dist.models.batch import TrainBatch
from vla_dist.models.member import PolicyModelConfig

_WORDS = ("open the drawer", "close the drawer", "press the button")


def make_train_batch(
    config: PolicyModelConfig,
    *,
    num_windows: int = 4,
    state_dim: int | None = None,
    image_size: tuple[int, int] = (32, 32),
    seed: int = 0,
) -> TrainBatch:
    """Reproducible noise; window b begins with b % K padded steps and its chunk ends with b % H steps after the end.

    Args:
        state_dim: P of the robot; needed where the member does not look at proprio.
        image_size: (H, W) of each camera.
    """
    rng = np.random.default_rng(seed)
    num, steps, horizon, size = num_windows, config.context_steps, config.horizon, config.action_dim
    row = np.arange(num)[:, None]
    mask = np.arange(steps) >= row % steps
    chunk_mask = np.arange(horizon) < horizon - row % horizon

    def draw_actions(length: int) -> torch.Tensor:
        if config.head == "discrete":
            return torch.from_numpy(np.eye(size, dtype=np.float32)[rng.integers(size, size=(num, length))])
        return torch.from_numpy(rng.uniform(-0.9, 0.9, (num, length, size)).astype(np.float32))

    proprio_dim = config.state_dim if state_dim is None else state_dim
    states = torch.from_numpy(rng.normal(size=(num, steps, proprio_dim)).astype(np.float32))
    targets, later = draw_actions(steps), draw_actions(horizon - 1)
    first = np.arange(num) % 7
    valid, chunk_valid = torch.from_numpy(mask), torch.from_numpy(chunk_mask)
    return TrainBatch(
        states=states * valid[..., None],
        actions=draw_actions(steps) * valid[..., None],
        target_actions=targets * valid[..., None],
        returns_to_go=torch.from_numpy(rng.uniform(-1, 0, (num, steps)).astype(np.float32)) * valid,
        timesteps=torch.from_numpy(np.where(mask, first[:, None] + np.maximum(mask.cumsum(1) - 1, 0), 0)),
        padding_mask=valid,
        target_chunks=torch.cat([targets[:, -1:], later], 1) * chunk_valid[..., None],
        chunk_mask=chunk_valid,
        instructions=tuple(_WORDS[b % len(_WORDS)] for b in range(num)),
        tasks=tuple(f"task-{b % len(_WORDS)}" for b in range(num)),
        success=torch.from_numpy(np.arange(num) % 3 != 2),
        interventions=torch.zeros(num, steps, dtype=torch.bool),
        goals=torch.from_numpy(rng.normal(size=(num, config.goal_dim)).astype(np.float32)) if config.goal_dim else None,
        images={
            name: torch.from_numpy(rng.integers(0, 256, (num, steps, 3, *image_size), dtype=np.uint8))
            for name in config.cameras or ()
        },
    )
