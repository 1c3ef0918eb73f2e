"""One optimiser step: gradient, clip, AdamW on a warm-up and cosine schedule, moving average of the weights.

Shapes: B windows a rank, N micro-batches.
"""

import contextlib
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.learner.algorithms.algorithm import Algorithm, NoSettings
from vla_dist.learner.parallel import OneRank, Parallel
from vla_dist.learner.part_rates import factor_of, parse_part_rates, require_parts
from vla_dist.learner.suspects import describe_suspects
from vla_dist.models.batch import TrainBatch
from vla_dist.models.member import PolicyModel, as_module

Precision = Literal["float32", "bfloat16"]
_ALGORITHM = "algorithm."
"""Before the names of parameters that are the algorithm's and not the model's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimiserConfig:
    """AdamW and its schedule."""

    total_updates: int
    """The cosine ends here."""
    learning_rate: float = 1e-3
    """Highest rate, reached at the end of the warm-up."""
    part_learning_rates: tuple[str, ...] = ()
    """``part=factor`` of that rate for a part of the model, such as ``visual=0.1``; see ``part_rates``."""
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
    num_micro_batches: int = 1
    """Parts that a batch is cut into; only one of them is in memory at a time, the update is that of the whole."""
    precision: Precision = "float32"
    """``bfloat16``: matrix products in it by autocast; weights, loss and optimiser stay float32."""
    compile: bool = False
    """torch.compile: the first update takes a minute, the others less than before."""

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
        parse_part_rates(self.part_learning_rates)
        if self.num_micro_batches < 1:
            raise ConfigError(f"num_micro_batches {self.num_micro_batches} must be at least 1: the batch uncut")
        if self.precision not in get_args(Precision):
            raise ConfigError(f"precision {self.precision!r} must be one of {', '.join(get_args(Precision))}")

    def learning_rate_at(self, update: int) -> float:
        """Rate of the update numbered from 0: a function of the count, so that nothing needs to be stored."""
        if update < self.warmup_updates:
            return self.learning_rate * (update + 1) / self.warmup_updates
        done = min(1.0, (update - self.warmup_updates) / max(1, self.total_updates - self.warmup_updates))
        fraction = self.final_fraction + (1 - self.final_fraction) * 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * fraction


class LossModule(nn.Module):
    """``forward`` is the algorithm's loss, so that wrapping it (DDP, FSDP2) covers whatever the loss does."""

    def __init__(self, model: PolicyModel, algorithm: Algorithm, *, precision: Precision = "float32") -> None:
        super().__init__()
        self.model = model
        self.algorithm = algorithm
        self._is_mixed = precision == "bfloat16"

    def forward(self, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """() float32 and detached metrics."""
        with torch.autocast(batch.states.device.type, torch.bfloat16, enabled=self._is_mixed):
            loss, metrics = self.algorithm.loss(self.model, batch)
        return loss.float(), metrics


class TrainStep:
    """Owns the optimiser's memory and the moving average of one model."""

    def __init__(
        self,
        model: PolicyModel,
        config: OptimiserConfig,
        *,
        algorithm: Algorithm | None = None,
        parallel: Parallel | None = None,
    ) -> None:
        """Args:
        algorithm: whose loss is minimised, with parameters of its own if it has any; None: the model's own loss.
        parallel: the other ranks; every rank must make the same calls in the same order. None: there are none.

        Raises:
            ConfigError: a learning rate is for a part that this model has not.
        """
        self._config = config
        self._parallel = parallel or OneRank()
        self._model = model
        self._algorithm = algorithm or Algorithm(NoSettings(), model=model.config, conditioning="none")
        loss = LossModule(model, self._algorithm, precision=config.precision)
        self._loss = self._parallel.prepare(loss, compiled=config.compile)
        trained = {name: p for name, p in as_module(model).named_parameters() if p.requires_grad}
        own = {f"{_ALGORITHM}{name}": p for name, p in self._algorithm.named_parameters()}
        self._parameters = {**trained, **own}
        self._optimiser = torch.optim.AdamW(
            _groups(self._parameters, parse_part_rates(config.part_learning_rates), config.weight_decay),
            lr=config.learning_rate,
            fused=all(p.device.type in _FUSED_DEVICES for p in self._parameters.values()),
        )
        self._average: dict[str, Tensor] = {}
        if config.ema_decay:
            self._average = {name: p.detach().clone() for name, p in trained.items()}

    def __call__(self, batch: TrainBatch, update: int) -> dict[str, Tensor | float]:
        """Do the update numbered from 0.

        Raises:
            DataError: the loss or its gradient is not finite; the weights are unchanged, and the windows that did it
                are named.
        """
        rate = self._config.learning_rate_at(update)
        for group in self._optimiser.param_groups:
            group["lr"] = rate * group["factor"]
        self._loss.train()
        self._optimiser.zero_grad(set_to_none=True)
        metrics = self._backward(batch)
        norm = self._parallel.whole(
            nn.utils.clip_grad_norm_(list(self._parameters.values()), self._config.gradient_clip)
        )
        if not torch.isfinite(norm):
            self._optimiser.zero_grad(set_to_none=True)
            raise DataError(
                f"the gradient of update {update} is not finite (loss {float(metrics['loss'])}); nothing was changed. "
                f"{describe_suspects(self._loss, batch)}. Remove those episodes, or lower the learning rate {rate:.2g}"
            )
        self._optimiser.step()
        self._update_average()
        self._algorithm.updated(self._parallel)
        return {**metrics, "gradient_norm": norm, "learning_rate": rate}

    def weights(self) -> dict[str, Tensor]:
        """All tensors of the model's state_dict, whole. Blocking: every rank must call it."""
        return {name: self._parallel.whole(value) for name, value in as_module(self._model).state_dict().items()}

    def algorithm_tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of the algorithm, whole. Blocking: every rank must call it."""
        return {name: self._parallel.whole(value) for name, value in self._algorithm.state_dict().items()}

    def published_weights(self) -> dict[str, Tensor]:
        """``weights`` with the moving average in place of what is trained, where there is one."""
        averages = {name: self._parallel.whole(value) for name, value in self._average.items()}
        return {**self.weights(), **averages}

    def tensors(self) -> dict[str, Tensor]:
        """The optimiser's memory and the average, whole, by parameter name. Blocking: every rank must call it."""
        found = {f"ema/{name}": self._parallel.whole(value) for name, value in self._average.items()}
        for name, parameter in self._parameters.items():
            for key, value in self._optimiser.state.get(parameter, {}).items():
                found[f"adamw/{key}/{name}"] = self._parallel.whole(value)
        return found

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
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
                    self._average[name].copy_(self._parallel.part_like(value, parameter))
            elif key == "step":
                # The fused AdamW counts where the parameters are, the other one on the CPU.
                is_fused = self._optimiser.param_groups[0]["fused"]
                state.setdefault(parameter, {})[key] = value.to(parameter.device if is_fused else "cpu", copy=True)
            else:
                state.setdefault(parameter, {})[key] = self._parallel.part_like(value, parameter).clone()
        self._optimiser.state.update(state)

    def _backward(self, batch: TrainBatch) -> dict[str, Tensor]:
        """Gradients of the mean over all terms of all ranks' micro-batches; this rank's mean metrics."""
        parts = _cut(batch, self._config.num_micro_batches)
        counts = torch.stack([self._count(part) for part in parts])
        own = counts.sum()
        # Ranks average their gradients, so each term is scaled to count once among those of all ranks.
        everywhere = self._parallel.sum(own) / self._parallel.num_ranks
        metrics: dict[str, Tensor] = {}
        for index, part in enumerate(parts):
            is_last = index + 1 == len(parts)
            with contextlib.nullcontext() if is_last else self._parallel.accumulating(self._loss):
                loss, found = self._loss(part)
                (loss * (counts[index] / everywhere)).backward()
            for name, value in found.items():
                metrics[name] = metrics.get(name, 0.0) + value.detach() * (counts[index] / own)
        return metrics

    def _count(self, batch: TrainBatch) -> Tensor:
        # A part of padding alone has no terms, and its loss of nothing must not become NaN.
        return self._algorithm.loss_count(self._model, batch).clamp(min=1e-6)

    @torch.no_grad()
    def _update_average(self) -> None:
        for name, average in self._average.items():
            average.lerp_(self._parameters[name].detach(), 1.0 - self._config.ema_decay)


_FUSED_DEVICES = ("cpu", "cuda")


def _groups(
    parameters: Mapping[str, nn.Parameter | Tensor], factors: Mapping[str, float], weight_decay: float
) -> list[dict[str, Any]]:
    """Parameters that share a factor of the learning rate and are matrices, which decay, or not."""
    require_parts(factors, parameters)
    members: dict[tuple[float, bool], list[Any]] = {}
    for name, parameter in parameters.items():
        members.setdefault((factor_of(name, factors), parameter.ndim >= 2), []).append(parameter)
    return [
        {"params": some, "factor": factor, "weight_decay": weight_decay if is_matrix else 0.0}
        for (factor, is_matrix), some in members.items()
    ]


def _cut(batch: TrainBatch, num: int) -> list[TrainBatch]:
    if num == 1:
        return [batch]
    edges = [batch.num_windows * index // num for index in range(num + 1)]
    return [batch.rows(start, stop) for start, stop in itertools.pairwise(edges)]
