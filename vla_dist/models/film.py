"""Feature-wise linear modulation: words scale and shift what a network sees.

Source: Perez et al. 2018, "FiLM", equation 2, in the form (1 + gamma) x + beta of RT-1 (Brohan et al. 2022, section
5.1).
"""

from typing import cast

import torch
from torch import Tensor, nn
from transformers import initialization as init


class FiLM(nn.Linear):
    """Starts as the identity, so that a pretrained network is not disturbed by words it never saw."""

    def __init__(self, condition_dim: int, channels: int) -> None:
        super().__init__(condition_dim, 2 * channels)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to the identity."""
        init.zeros_(self.weight)
        init.zeros_(self.bias)

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        """(B, C, ...) features and (B, condition_dim) to (B, C, ...)."""
        scale, shift = cast(Tensor, super().forward(condition)).chunk(2, -1)
        shape = (*scale.shape, *([1] * (features.ndim - 2)))
        return torch.addcmul(shift.view(shape), 1.0 + scale.view(shape), features)
