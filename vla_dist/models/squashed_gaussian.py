"""A distribution over actions in [-1, 1] with a density and an entropy.

Shapes: A action dimensions; "..." any leading dimensions.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

_LOG_STD = (-5.0, 2.0)
# atanh of an action at its bound is infinite; nearer to it than this makes the likelihood of saturated actions
# outweigh everything else.
_WIDEST = 1.0 - 1e-3
_NODES, _NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(16)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SquashedGaussian:
    """tanh of a Gaussian, independent in each dimension.

    Source: Zheng et al. 2022, "Online Decision Transformer", section 4; the bounds of the standard deviation are those
    of its code.
    """

    mean: Tensor
    """(..., A), before tanh."""
    log_std: Tensor
    """(..., A), of the Gaussian, within [-5, 2]."""

    @classmethod
    def of(cls, outputs: Tensor) -> "SquashedGaussian":
        """From the (..., 2A) outputs of a head: means, then what the standard deviations are made from."""
        mean, raw = outputs.chunk(2, -1)
        low, high = _LOG_STD
        return cls(mean=mean, log_std=low + 0.5 * (high - low) * (raw.tanh() + 1.0))

    def mode(self) -> Tensor:
        """(..., A) in [-1, 1]: tanh of the mean, which is the median."""
        return self.mean.tanh()

    def sample(self, noise: Tensor) -> Tensor:
        """(..., A) in [-1, 1], differentiable; ``noise`` is standard normal, (..., A)."""
        return (self.mean + self.log_std.exp() * noise).tanh()

    def log_prob(self, actions: Tensor) -> Tensor:
        """(...), natural logarithm of the joint density of (..., A) actions; those at a bound count as 1e-3 inside."""
        inner = torch.atanh(actions.clamp(-_WIDEST, _WIDEST))
        scaled = (inner - self.mean) * (-self.log_std).exp()
        gaussian = -0.5 * scaled.square() - self.log_std - 0.5 * math.log(2 * math.pi)
        return (gaussian - _log_slope(inner)).sum(-1)

    def entropy(self) -> Tensor:
        """(...), differential entropy in nats, summed over A: exact but for a quadrature of 16 nodes, so no noise."""
        nodes = self.mean.new_tensor(_NODES)
        weights = self.mean.new_tensor(_NODE_WEIGHTS / _NODE_WEIGHTS.sum())
        points = self.mean[..., None] + self.log_std.exp()[..., None] * nodes
        stretched = (_log_slope(points) * weights).sum(-1)
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e) + stretched).sum(-1)


def _log_slope(inner: Tensor) -> Tensor:
    """log(1 - tanh(x)^2) without the cancellation."""
    return 2.0 * (math.log(2.0) - inner - softplus(-2.0 * inner))
