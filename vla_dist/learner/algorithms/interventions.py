"""Corrections by a person count more than what the policy did before and around them.

Shapes: B windows, K context steps, F steps after each window.
"""

from dataclasses import dataclass

import numpy as np

from vla_dist.core.errors import ConfigError
from vla_dist.core.types import Array, Batch

_LARGEST = 20.0
"""A single corrected step in a batch shall not be all of its gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InterventionWeights:
    """Weights of steps; they go with every algorithm."""

    share: float = 0.5
    """Part of each batch's weight that steps under a person's control have together."""
    before_steps: int = 8
    """A person takes over because of what the policy did just before: in this many steps."""
    before_weight: float = 0.0
    """Of those steps; 0 leaves them out."""

    def __post_init__(self) -> None:
        if not (0 < self.share < 1 and self.before_steps >= 0 and 0 <= self.before_weight <= 1):
            raise ConfigError(
                f"intervention share {self.share} must be within 0..1 (both left out), before_steps "
                f"{self.before_steps} at least 0, before_weight {self.before_weight} within 0..1"
            )


def intervention_weights(batch: Batch, config: InterventionWeights) -> Array | None:
    """(B, K) float32 weights whose mean over valid steps is about 1; None where nobody intervened.

    Only episodes of policies can be intervened in; a person's own demonstration counts as any other step.

    Source: Mandlekar et al. 2020, "Human-in-the-Loop Imitation Learning using Remote Teleoperation", section IV-B
    (intervention weighted regression: corrections and the rest count alike); Liu et al. 2022, "Robot Learning on the
    Job" (Sirius), section IV-C, for leaving out what made the person take over.

    Raises:
        ConfigError: the batch does not show as many steps after its windows as ``before_steps`` asks for.
    """
    if batch.interventions is None:
        return None
    num_steps = batch.padding_mask.shape[1]
    is_policy = np.array([source == "policy" for source in batch.sources])[:, None]
    valid = np.asarray(batch.padding_mask, bool)
    corrected = batch.interventions & valid & is_policy
    future = batch.future_interventions
    held = 0 if future is None else future.shape[1]
    if held < config.before_steps:
        raise ConfigError(
            f"the replay shows {held} steps after each window but before_steps is {config.before_steps}; set the "
            "buffer's future_steps to it"
        )
    later = corrected if future is None else np.concatenate([corrected, future & is_policy], 1)
    weights = np.ones(valid.shape, np.float32)
    taken_over = np.zeros(valid.shape, bool)
    for ahead in range(1, config.before_steps + 1):
        shifted = later[:, ahead : ahead + num_steps]
        taken_over[:, : shifted.shape[1]] |= shifted
    weights[taken_over & ~corrected & valid] = config.before_weight
    num_corrected, num_valid = int(corrected.sum()), int(valid.sum())
    rest = float(weights[valid & ~corrected].sum())
    if num_corrected and rest:
        weights[corrected] = min(_LARGEST, config.share * num_valid / num_corrected)
        weights[valid & ~corrected] *= (num_valid - num_corrected * weights[corrected][0]) / rest
    return weights
