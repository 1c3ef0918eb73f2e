"""The data's scales, inside the models: readings and goals come in as they are and are normalised here.

Shapes: ... any leading dimensions, P proprio, G goal.
"""

import torch
from torch import Tensor, nn

from vla_dist.core.errors import DataError

_LARGEST_NORMALISED = 10.0
_LEAST_SPREAD = 1e-6


class InputScales(nn.Module):
    """Means and deviations as buffers of the module that inherits this, so that they travel with its weights."""

    proprio_mean: Tensor
    """(P,) float32."""
    proprio_std: Tensor
    goal_mean: Tensor
    """(G,) float32."""
    goal_std: Tensor

    def register_scales(self, state_dim: int, goal_dim: int) -> None:
        """Zero means and deviations of one, until ``set_normaliser`` brings the data's."""
        self.register_buffer("proprio_mean", torch.zeros(state_dim))
        self.register_buffer("proprio_std", torch.ones(state_dim))
        self.register_buffer("goal_mean", torch.zeros(goal_dim))
        self.register_buffer("goal_std", torch.ones(goal_dim))

    def set_normaliser(
        self,
        *,
        proprio_mean: Tensor | None = None,
        proprio_std: Tensor | None = None,
        goal_mean: Tensor | None = None,
        goal_std: Tensor | None = None,
    ) -> None:
        """Fill the buffers; None leaves one as it is. A dimension that never moved (std near 0) keeps its scale.

        Raises:
            DataError: a shape differs from the config, or a number is not finite; then none is changed.
        """
        given = {
            "proprio_mean": proprio_mean,
            "proprio_std": proprio_std,
            "goal_mean": goal_mean,
            "goal_std": goal_std,
        }
        values = {name: value for name, value in given.items() if value is not None}
        for name, value in values.items():
            expected = getattr(self, name).shape
            if value.shape != expected or not torch.isfinite(value).all():
                raise DataError(f"{name} must be {tuple(expected)} finite numbers, got shape {tuple(value.shape)}")
        for name, value in values.items():
            if name.endswith("_std"):
                value = torch.where(value < _LEAST_SPREAD, torch.ones_like(value), value)
            getattr(self, name).copy_(value)

    def normalised(self, states: Tensor) -> Tensor:
        """(..., P) raw to (..., P): a reading far outside the training data must not drown every other input."""
        scaled = (states - self.proprio_mean) / self.proprio_std
        return scaled.clamp(-_LARGEST_NORMALISED, _LARGEST_NORMALISED)

    def normalised_goals(self, goals: Tensor) -> Tensor:
        """(..., G) sentence embeddings to (..., G); the mean of all words becomes zero."""
        return (goals - self.goal_mean) / self.goal_std
