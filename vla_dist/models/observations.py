"""Observations of several robots as arrays for a model, checked against the spec.

Shapes: B rows, P proprio, G goal.
"""

from collections.abc import Sequence

import numpy as np
import torch

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Array, Observation
from vla_dist.models.goals import GoalTable
from vla_dist.models.member import PolicyModelConfig


def require_fit(config: PolicyModelConfig, spec: EnvSpec, *, has_goals: bool) -> None:
    """Raises ConfigError naming every way in which a model's dimensions, head, cameras or language miss the spec."""
    wrong = []
    if config.state_dim not in (0, spec.proprio_dim):
        wrong.append(f"state_dim {config.state_dim} against proprio_dim {spec.proprio_dim}")
    if config.action_dim != spec.action_dim:
        wrong.append(f"action_dim {config.action_dim} against {spec.action_dim}")
    if (config.head == "discrete") != (spec.action_kind == "discrete"):
        wrong.append(f"head {config.head!r} against {spec.action_kind} actions")
    names = {camera.name for camera in spec.cameras}
    if not set(config.cameras or ()) <= names:
        wrong.append(f"cameras {config.cameras} against {sorted(names)}")
    if config.goal_dim and not has_goals:
        wrong.append(f"goal_dim {config.goal_dim} without a goal table")
    if wrong:
        raise ConfigError(f"the model does not fit spec {spec.name!r}: {'; '.join(wrong)}; build one from the spec")


def finite_vector(name: str, vector: Array, size: int) -> Array:
    """(size,) float32. Raises DataError where it has another shape, is no number or is not finite."""
    if vector.shape != (size,) or vector.dtype.kind not in "fiub" or not np.isfinite(vector).all():
        raise DataError(
            f"{name} must be ({size},) finite numbers, got {vector.dtype} of shape {vector.shape}: {vector}"
        )
    return vector.astype(np.float32, copy=False)


def proprio_rows(observations: Sequence[Observation], spec: EnvSpec) -> Array:
    """(B, P) float32. Raises DataError where a reading has another shape or is not finite."""
    return np.stack([finite_vector("proprio", one.proprio, spec.proprio_dim) for one in observations])


def camera_frames(
    observations: Sequence[Observation], spec: EnvSpec, cameras: Sequence[str]
) -> dict[str, torch.Tensor]:
    """camera name -> (B, 3, H, W) uint8. Raises DataError where a frame is missing or has another size or type."""
    views = {}
    for camera in (c for c in spec.cameras if c.name in cameras):
        frames = [observation.images.get(camera.name) for observation in observations]
        expected = f"uint8 of shape ({camera.height}, {camera.width}, 3)"
        found = {"nothing" if frame is None else f"{frame.dtype} of shape {frame.shape}" for frame in frames}
        if found != {expected}:
            raise DataError(f"camera {camera.name!r} must give {expected}, got {', '.join(sorted(found - {expected}))}")
        stacked = np.stack([frame for frame in frames if frame is not None])
        views[camera.name] = torch.from_numpy(stacked).permute(0, 3, 1, 2)
    return views


def goal_rows(instructions: Sequence[str], goals: GoalTable, nothing: Array) -> Array:
    """(B, G) float32.

    Args:
        nothing: (G,) vector of no words at all: the mean of all words, which a model's normaliser makes zero.
    """
    words = [text for text in instructions if text]
    found = dict(zip(words, goals.lookup(words), strict=True)) if words else {}
    return np.stack([found[text] if text else nothing for text in instructions])


def pushed(history: Array, newest: Array | np.float32) -> Array:
    """Drops the oldest row; a new read-only array, so that older states stay what they were."""
    moved = np.empty_like(history)
    moved[:-1] = history[1:]
    moved[-1] = newest
    moved.flags.writeable = False
    return moved
