"""What to expect from a state: a distribution over returns, learnt as a classification.

Source: Farebrother et al. 2024, "Stop Regressing", section 3.1: the histogram of a Gaussian (HL-Gauss) as target.

Shapes: "..." any leading dimensions, P proprio, G goal, N bins.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from vla_dist.core.errors import ConfigError
from vla_dist.models.step_encoder import StepEncoder

_SPREAD = 0.75
"""Standard deviation of a target in widths of a bin, the value of the paper."""


class ReturnDistribution(nn.Module):
    """Shares nothing with the policy, so that neither bends the other's features."""

    support: Tensor
    """(N + 1,) float32, edges of the bins."""

    def __init__(
        self,
        *,
        state_dim: int,
        goal_dim: int,
        low: float,
        high: float,
        num_bins: int = 51,
        width: int = 64,
        cameras: Sequence[str] = (),
        visual: Mapping[str, Any] | None = None,
    ) -> None:
        """Args:
        low, high: no return lies outside.
        """
        super().__init__()
        if num_bins < 2 or width < 1 or not low < high:
            raise ConfigError(f"a distribution of {num_bins} bins within {low}..{high} of width {width} is impossible")
        self.encoder = StepEncoder(
            state_dim=state_dim, goal_dim=goal_dim, output_dim=width, cameras=cameras, visual=visual
        )
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 2 * width)
        self.head = nn.Linear(2 * width, num_bins)
        self.register_buffer("support", torch.linspace(low, high, num_bins + 1))

    def forward(self, states: Tensor, goals: Tensor | None, images: Mapping[str, Tensor]) -> Tensor:
        """(..., P) raw, (..., G) and camera name -> (..., 3, H, W), to (..., N) logits."""
        features = self.encoder(states, goals, self.encoder.encode_images(images))
        return self.head(gelu(self.widen(gelu(self.norm(features)))))

    def expected(self, logits: Tensor) -> Tensor:
        """(..., N) to the (...) mean of the distribution."""
        centres = (self.support[1:] + self.support[:-1]) / 2
        return (logits.float().softmax(-1) * centres).sum(-1)

    def surprise(self, logits: Tensor, returns: Tensor) -> Tensor:
        """(...) cross-entropy in nats of (..., N) logits against the histogram around the (...) returns."""
        low, high = self.support[0], self.support[-1]
        spread = _SPREAD * (high - low) / (len(self.support) - 1)
        inside = returns.clamp(low, high)[..., None]
        below = torch.special.ndtr((self.support - inside) / spread)
        histogram = below.diff(dim=-1) / (below[..., -1:] - below[..., :1])
        return -(histogram * logits.float().log_softmax(-1)).sum(-1)
