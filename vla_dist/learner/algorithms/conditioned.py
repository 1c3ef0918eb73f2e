"""Cloning of everything that was tried, told how well it went: acting asks for what went well.

Shapes: B windows, K context steps, N bins of the return, Q quantiles.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vla_dist.core.errors import ConfigError
from vla_dist.learner.algorithms.algorithm import Algorithm
from vla_dist.learner.algorithms.decision_transformer import reads_returns
from vla_dist.learner.parallel import Parallel
from vla_dist.models.batch import TrainBatch
from vla_dist.models.conditioning import ConditioningKind
from vla_dist.models.member import PolicyModel, PolicyModelConfig, masked_mean
from vla_dist.models.value_head import ReturnDistribution

_KINDS: tuple[ConditioningKind, ...] = ("success", "advantage", "reward_advantage")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionedSettings:
    """Of the condition, and of the value head that advantages need."""

    quantiles: tuple[float, ...] = (0.7,)
    """Of the advantage, at which one bin of the condition ends and the next begins: (0.7,) calls the best 30 % of
    steps good and the others bad."""
    threshold_rate: float = 0.02
    """Of the moving average over batches of where these quantiles lie."""
    num_return_bins: int = 51
    value_width: int = 64
    value_weight: float = 1.0
    """Of the value head's loss; it shares nothing with the policy, so this only scales its gradient before clipping."""

    def __post_init__(self) -> None:
        quantiles = list(self.quantiles)
        if not quantiles or quantiles != sorted(set(quantiles)) or not 0 < quantiles[0] <= quantiles[-1] < 1:
            raise ConfigError(f"quantiles {self.quantiles} must increase within 0..1, both ends left out")
        if not (0 < self.threshold_rate <= 1 and self.value_weight > 0):
            raise ConfigError(
                f"threshold_rate {self.threshold_rate} must be within 0..1 and value_weight {self.value_weight} above 0"
            )


class Conditioned(Algorithm):
    """The model reads a condition in place of its return: -1 for the worst bin, 1 for the best.

    With conditioning ``success`` it is whether the episode succeeded, as 0 or 1. With ``advantage`` (of steps to
    success) or ``reward_advantage`` it is the bin of A(s, a) = R - V(s): the return R that followed, less what a
    distributional value head expects from the state. What a person did while correcting counts as the best bin. A
    model with ``return_dropout`` also learns to act without a condition.

    Source: Kumar et al. 2019, "Reward-Conditioned Policies", sections 4.1 and 4.2; Physical Intelligence 2025,
    "pi*0.6", section IV, for the distributional value, thresholds by quantile and corrections that count as good.
    """

    Settings = ConditionedSettings
    settings: ConditionedSettings
    thresholds: Tensor
    """(Q,) advantages."""
    is_measured: Tensor
    """() bool, an update has set them."""

    def __init__(self, settings: Any, *, model: PolicyModelConfig, conditioning: ConditioningKind) -> None:
        super().__init__(settings, model=model, conditioning=conditioning)
        if not reads_returns(model) or conditioning not in _KINDS:
            raise ConfigError(
                "conditioned needs a decision transformer with use_returns=true and a conditioning of "
                f"{', '.join(_KINDS)}; got {conditioning!r}"
            )
        self.value = None
        self._batch_quantiles: list[Tensor] = []
        self.register_buffer("thresholds", torch.zeros(len(settings.quantiles)))
        self.register_buffer("is_measured", torch.tensor(False))
        if conditioning != "success":
            self.value = ReturnDistribution(
                state_dim=model.state_dim,
                goal_dim=model.goal_dim,
                low=-1.0,
                high=0.0 if conditioning == "advantage" else 1.0,
                num_bins=settings.num_return_bins,
                width=settings.value_width,
                cameras=tuple(model.cameras or ()),
                visual=getattr(model, "visual", None),
            )

    def set_normaliser(self, **scales: Tensor | None) -> None:
        if self.value is not None:
            self.value.encoder.set_normaliser(**scales)

    def prepare(self, batch: TrainBatch) -> TrainBatch:
        self._batch_quantiles = []
        return batch

    def loss(self, model: PolicyModel, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        if self.value is None:
            return model.loss(batch)
        goals = None if batch.goals is None else batch.goals[:, None].expand(*batch.states.shape[:2], -1)
        logits = self.value(batch.states, goals, batch.images)
        mask = batch.padding_mask
        surprise = masked_mean(self.value.surprise(logits, batch.returns_to_go), mask)
        advantage = batch.returns_to_go - self.value.expected(logits.detach())
        condition = self._condition(advantage, mask, batch.interventions)
        loss, metrics = model.loss(replace(batch, returns_to_go=condition))
        metrics["value_surprise"] = surprise.detach()
        metrics["advantage_std"] = masked_mean(advantage.square(), mask).sqrt()
        metrics["good_share"] = masked_mean((condition == 1.0).float(), mask)
        return loss + self.settings.value_weight * surprise, metrics

    def updated(self, parallel: Parallel) -> None:
        if not self._batch_quantiles:
            return
        found = parallel.sum(torch.stack(self._batch_quantiles).mean(0)) / parallel.num_ranks
        self._batch_quantiles = []
        rate = self.settings.threshold_rate
        self.thresholds.copy_(torch.where(self.is_measured, self.thresholds.lerp(found, rate), found))
        self.is_measured.fill_(True)

    def _condition(self, advantage: Tensor, mask: Tensor, interventions: Tensor) -> Tensor:
        """(B, K) advantages to (B, K) conditions within -1..1; 0 where padded."""
        levels = torch.tensor(self.settings.quantiles, device=advantage.device)
        quantiles = torch.nanquantile(torch.where(mask, advantage, torch.nan).flatten(), levels)
        if self.training and torch.is_grad_enabled():
            self._batch_quantiles.append(quantiles)
        edges = torch.where(self.is_measured, self.thresholds, quantiles)
        bins = (advantage[..., None] > edges).sum(-1).float()
        condition = torch.where(interventions, 1.0, 2.0 * bins / len(levels) - 1.0)
        return torch.where(mask, condition, 0.0)
