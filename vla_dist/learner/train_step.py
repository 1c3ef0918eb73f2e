"""One optimiser step: gradient, clip, AdamW on a warm-up and cosine schedule, moving average of the weights."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.models.batch import TrainBatch
from vla_dist.models.decision_transformer import DecisionTransformer


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimiserConfig:
    """AdamW and its schedule."""

    total_updates: int
    """The cosine ends here."""
    learning_rate: float = 1e-3
    """Highest rate, reached at the end of the warm-up."""
    final_fraction: float = 0.0
    """The cosine ends at this part of ``learning_rate``."""
    warmup_updates: int = 0
    """Linear from 0."""
    weight_decay: float = 1e-4
    """On matrices only, not on biases and norms."""
    gradient_clip: float = 1.0
    """Largest L2 norm of the whole gradient."""
    ema_decay: float = 0.0
    """Of the published weights; 0: publish the weights themselves."""

    def __post_init__(self) -> None:
        if self.total_updates < 1 or not 0 <= self.warmup_updates < self.total_updates:
            raise ConfigError(
                f"warmup_updates {self.warmup_updates} must be within 0..{self.total_updates - 1}, below total_updates"
            )
        if not (self.learning_rate > 0 and self.gradient_clip > 0 and self.weight_decay >= 0):
            raise ConfigError(
                f"learning_rate {self.learning_rate} and gradient_clip {self.gradient_clip} must be positive, "
                f"weight_decay {self.weight_decay} not negative"
            )
        if not (0 <= self.final_fraction <= 1 and 0 <= self.ema_decay < 1):
            raise ConfigError(
                f"final_fraction {self.final_fraction} must be within 0..1, ema_decay {self.ema_decay} within [0, 1)"
            )

    def learning_rate_at(self, update: int) -> float:
        """Rate of the update numbered from 0: a function of the count, so that nothing needs to be stored."""
        if update < self.warmup_updates:
            return self.learning_rate * (update + 1) / self.warmup_updates
        done = min(1.0, (update - self.warmup_updates) / max(1, self.total_updates - self.warmup_updates))
        fraction = self.final_fraction + (1 - self.final_fraction) * 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * fraction


class LossModule(nn.Module):
    """``forward`` is the model's loss, so that wrapping it (DDP) covers whatever the loss does."""

    def __init__(self, model: DecisionTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.model.loss(batch)


class TrainStep:
    """Owns the optimiser's memory and the moving average of one model."""

    def __init__(self, model: DecisionTransformer, config: OptimiserConfig, *, loss: nn.Module) -> None:
        """Args:
        loss: a LossModule over ``model``, wrapped or not.
        """
        self._config = config
        self._loss = loss
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        matrices = [p for p in self._parameters.values() if p.ndim >= 2]
        vectors = [p for p in self._parameters.values() if p.ndim < 2]
        self._optimiser = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=config.learning_rate,
        )
        self._average: dict[str, Tensor] = {}
        if config.ema_decay:
            self._average = {name: p.detach().clone() for name, p in self._parameters.items()}

    def __call__(self, batch: TrainBatch, update: int) -> dict[str, Tensor | float]:
        """Do the update numbered from 0.

        Raises:
            DataError: the loss or its gradient is not finite; the weights are unchanged.
        """
        rate = self._config.learning_rate_at(update)
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._loss.train()
        self._optimiser.zero_grad(set_to_none=True)
        loss, metrics = self._loss(batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(list(self._parameters.values()), self._config.gradient_clip)
        if not torch.isfinite(norm):
            raise DataError(
                f"the gradient of update {update} is not finite (loss {loss.item()}); look for extreme values in the "
                f"data or lower the learning rate {rate:.2g}"
            )
        self._optimiser.step()
        self._update_average()
        return {**metrics, "gradient_norm": norm, "learning_rate": rate}

    def published_weights(self) -> dict[str, Tensor]:
        """Parameters by name: the moving average where there is one, else the weights."""
        return self._average or {name: p.detach() for name, p in self._parameters.items()}

    def tensors(self) -> dict[str, Tensor]:
        """The optimiser's memory and the average, by parameter name, for a checkpoint."""
        found = {f"ema/{name}": value for name, value in self._average.items()}
        for name, parameter in self._parameters.items():
            for key, value in self._optimiser.state.get(parameter, {}).items():
                found[f"adamw/{key}/{name}"] = value
        return found

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of ``tensors``.

        Raises:
            DataError: a name or shape that this model does not have.
        """
        state: dict[Tensor, dict[str, Tensor]] = {}
        for path, value in tensors.items():
            kind, _, name = path.partition("/")
            key = ""
            if kind == "adamw":
                key, _, name = name.partition("/")
            parameter = self._parameters.get(name)
            if parameter is None or (key != "step" and value.shape != parameter.shape):
                raise DataError(
                    f"checkpoint tensor {path} of shape {tuple(value.shape)} fits no parameter; wrong model?"
                )
            if kind == "ema":
                if self._average:
                    self._average[name].copy_(value)
                continue
            # AdamW keeps its step count on the CPU whatever the parameter's device.
            state.setdefault(parameter, {})[key] = (
                value.clone() if key == "step" else value.to(parameter.device).clone()
            )
        self._optimiser.state.update(state)

    @torch.no_grad()
    def _update_average(self) -> None:
        for name, average in self._average.items():
            average.lerp_(self._parameters[name], 1.0 - self._config.ema_decay)
