"""Features to chunks of actions: what is learned, and how an action is drawn from it.

Shapes: B batch, H horizon, A action, D features, N bins.
"""

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.models.member import masked_mean
from vla_dist.models.settings import did_you_mean
from vla_dist.models.squashed_gaussian import SquashedGaussian

NUM_BINS = 256
_EULER_STEPS = 10
_TIME_FREQUENCIES = 16


def to_bins(actions: Tensor, num_bins: int = NUM_BINS) -> Tensor:
    """Actions in [-1, 1] to the int64 index of the bin that holds them; those outside take the outermost bin.

    Source: Brohan et al. 2022, RT-1, section 5.1: 256 uniform bins over the bounds of each dimension.

    Raises:
        DataError: a number is not finite. Not checked on a GPU, where looking would wait for it.
    """
    if actions.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.isfinite(actions).all():
        raise DataError("actions must be finite numbers within [-1, 1] to be put into bins; remove those episodes")
    return ((actions.float() + 1.0) * (0.5 * num_bins)).floor().long().clamp(0, num_bins - 1)


def from_bins(bins: Tensor, num_bins: int = NUM_BINS) -> Tensor:
    """Bin indices to float32 bin centres in (-1, 1): at most half a bin, 1 / num_bins, from what was encoded."""
    return (bins.float() + 0.5) * (2.0 / num_bins) - 1.0


class ActionHead(nn.Module, ABC):
    """What every head can do; ``targets`` and actions are in [-1, 1], or one-hot where the head is ``discrete``."""

    def __init__(self, features: int, horizon: int, action_dim: int) -> None:
        super().__init__()
        if min(features, horizon, action_dim) < 1:
            raise ConfigError(f"a head needs positive sizes: features {features}, horizon {horizon}, A {action_dim}")
        self.horizon = horizon
        self.action_dim = action_dim

    @abstractmethod
    def loss(
        self, features: Tensor, targets: Tensor, mask: Tensor, weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What to minimise, and detached scalars.

        Args:
            features: (B, D).
            targets: (B, H, A).
            mask: (B, H) bool, True where there is a target; elsewhere ``targets`` may be anything finite.
            weights: (B,), how much each row counts; None: all alike.
        """

    @abstractmethod
    def decode(self, features: Tensor, generator: np.random.Generator | None = None) -> Tensor:
        """(B, D) to (B, H, A): actions in [-1, 1], or logits where the head is ``discrete``.

        Args:
            generator: draws from the head's distribution where it has one; None: its most likely action.
        """

    def _chunks(self, flat: Tensor) -> Tensor:
        """(B, H * A * M) to (B, H, A, M), or to (B, H, A) where M is 1."""
        return flat.unflatten(-1, (self.horizon, self.action_dim, -1)).squeeze(-1)


class MseHead(ActionHead):
    """Squared error of a tanh."""

    def __init__(self, features: int, horizon: int, action_dim: int) -> None:
        super().__init__(features, horizon, action_dim)
        self.project = nn.Linear(features, horizon * action_dim)

    def loss(
        self, features: Tensor, targets: Tensor, mask: Tensor, weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        predicted = self.decode(features)
        loss = masked_mean((predicted - targets).square().mean(-1), mask, weights)
        return loss, {"action_error": _action_error(predicted, targets, mask)}

    def decode(self, features: Tensor, generator: np.random.Generator | None = None) -> Tensor:
        return self._chunks(self.project(features)).tanh()


class GaussianHead(ActionHead):
    """Likelihood, a mean over dimensions, of a Gaussian squashed by tanh."""

    def __init__(self, features: int, horizon: int, action_dim: int) -> None:
        super().__init__(features, horizon, action_dim)
        self.project = nn.Linear(features, horizon * 2 * action_dim)

    def _distribution(self, features: Tensor) -> SquashedGaussian:
        return SquashedGaussian.of(self.project(features).unflatten(-1, (self.horizon, 2 * self.action_dim)))

    def loss(
        self, features: Tensor, targets: Tensor, mask: Tensor, weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        found = self._distribution(features)
        loss = masked_mean(-found.log_prob(targets) / self.action_dim, mask, weights)
        return loss, {
            "action_error": _action_error(found.mode(), targets, mask),
            "action_std": found.log_std.detach().exp().mean(),
        }

    def decode(self, features: Tensor, generator: np.random.Generator | None = None) -> Tensor:
        found = self._distribution(features)
        return found.sample(_noise(found.mean, generator))


class BinsHead(ActionHead):
    """Cross-entropy over uniform bins of each dimension; decodes to bin centres."""

    def __init__(self, features: int, horizon: int, action_dim: int, num_bins: int = NUM_BINS) -> None:
        super().__init__(features, horizon, action_dim)
        if num_bins < 2:
            raise ConfigError(f"num_bins {num_bins} must be at least 2")
        self.num_bins = num_bins
        self.project = nn.Linear(features, horizon * action_dim * num_bins)

    def loss(
        self, features: Tensor, targets: Tensor, mask: Tensor, weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self._chunks(self.project(features))
        return bins_loss(logits, targets, mask, weights)

    def decode(self, features: Tensor, generator: np.random.Generator | None = None) -> Tensor:
        logits = self._chunks(self.project(features))
        if generator is not None:
            uniform = torch.from_numpy(generator.uniform(1e-12, 1.0, tuple(logits.shape))).to(logits)
            logits = logits - uniform.log().neg().log()
        return from_bins(logits.argmax(-1), self.num_bins)


class FlowHead(ActionHead):
    """A velocity field from noise to actions, followed in 10 Euler steps.

    Source: Black et al. 2024, pi-0, section IV and appendix B, with uniform instead of Beta-distributed times; Lipman
    et al. 2023, "Flow Matching", equation 23, for the loss on straight paths.
    """

    def __init__(self, features: int, horizon: int, action_dim: int) -> None:
        super().__init__(features, horizon, action_dim)
        width = max(128, features)
        self.embed_features = nn.Linear(features, width)
        self.embed_actions = nn.Linear(horizon * action_dim, width)
        self.embed_time = nn.Linear(2 * _TIME_FREQUENCIES, width)
        self.velocity = nn.Sequential(
            nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, horizon * action_dim)
        )

    def _velocity(self, actions: Tensor, time: Tensor, features: Tensor) -> Tensor:
        """(B, H, A) at times (B,) to the (B, H, A) direction in which to move on."""
        octaves = torch.arange(_TIME_FREQUENCIES, device=time.device, dtype=torch.float32)
        angles = time.float()[:, None] * (2.0**octaves * (math.pi / 2**7))
        waves = torch.cat([angles.sin(), angles.cos()], -1).to(features.dtype)
        hidden = self.embed_features(features) + self.embed_actions(actions.flatten(1)) + self.embed_time(waves)
        return self._chunks(self.velocity(hidden))

    def loss(
        self, features: Tensor, targets: Tensor, mask: Tensor, weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        noise, time = torch.randn_like(targets), torch.rand(len(targets), device=targets.device, dtype=targets.dtype)
        on_the_way = noise + time[:, None, None] * (targets - noise)
        # Without this, what stands behind the episode's end would tell the network where the end is.
        on_the_way = torch.where(mask[..., None], on_the_way, noise)
        error = self._velocity(on_the_way, time, features) - (targets - noise)
        loss = masked_mean(error.square().mean(-1), mask, weights)
        return loss, {"velocity_error": loss.detach()}

    def decode(self, features: Tensor, generator: np.random.Generator | None = None) -> Tensor:
        """Without a generator it starts in the middle of the noise."""
        actions = _noise(features.new_zeros(len(features), self.horizon, self.action_dim), generator)
        for step in range(_EULER_STEPS):
            time = features.new_full((len(features),), step / _EULER_STEPS)
            actions = actions + self._velocity(actions, time, features) / _EULER_STEPS
        return actions.clamp(-1.0, 1.0)


class DiscreteHead(ActionHead):
    """Cross-entropy over A choices a step; decodes to logits."""

    def __init__(self, features: int, horizon: int, action_dim: int) -> None:
        super().__init__(features, horizon, action_dim)
        self.project = nn.Linear(features, horizon * action_dim)

    def loss(
        self, features: Tensor, targets: Tensor, mask: Tensor, weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return discrete_loss(self.decode(features), targets, mask, weights)

    def decode(self, features: Tensor, generator: np.random.Generator | None = None) -> Tensor:
        return self._chunks(self.project(features))


HEADS: dict[str, type[ActionHead]] = {
    "mse": MseHead,
    "gaussian": GaussianHead,
    "bins": BinsHead,
    "flow": FlowHead,
    "discrete": DiscreteHead,
}


def build_head(name: str, features: int, horizon: int, action_dim: int) -> ActionHead:
    """A head by name. Raises ConfigError for an unknown one."""
    if name not in HEADS:
        raise ConfigError(f"head {name!r} is unknown; {did_you_mean(name, HEADS)}it must be one of {', '.join(HEADS)}")
    return HEADS[name](features, horizon, action_dim)


def bins_loss(
    logits: Tensor, targets: Tensor, mask: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of (B, H, A, N) logits against (B, H, A) actions in [-1, 1], and its metrics."""
    num_bins = logits.shape[-1]
    bins = to_bins(targets, num_bins)
    entropy = cross_entropy(logits.flatten(0, 2).float(), bins.flatten(), reduction="none").view(bins.shape)
    chosen = logits.detach().argmax(-1)
    return masked_mean(entropy.mean(-1), mask, weights), {
        "accuracy": masked_mean((chosen == bins).float().mean(-1), mask),
        "action_error": _action_error(from_bins(chosen, num_bins), targets, mask),
    }


def discrete_loss(
    logits: Tensor, targets: Tensor, mask: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of (B, H, A) logits against (B, H, A) one-hot choices, and its metrics."""
    choice = targets.argmax(-1)
    entropy = cross_entropy(logits.flatten(0, 1).float(), choice.flatten(), reduction="none").view(choice.shape)
    right = (logits.detach().argmax(-1) == choice).float()
    return masked_mean(entropy, mask, weights), {"accuracy": masked_mean(right, mask)}


def _action_error(predicted: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    return masked_mean((predicted.detach() - targets).abs().mean(-1), mask)


def _noise(like: Tensor, generator: np.random.Generator | None) -> Tensor:
    """Standard normal numbers of this shape; zeros without a generator."""
    if generator is None:
        return torch.zeros_like(like)
    return torch.from_numpy(generator.standard_normal(tuple(like.shape))).to(like)
