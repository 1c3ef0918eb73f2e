"""What the learner asks of an algorithm: how a batch becomes a loss, and what is kept beside the model.

Shapes: B windows, K context steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from vla_dist.learner.parallel import Parallel
from vla_dist.models.batch import TrainBatch
from vla_dist.models.conditioning import ConditioningKind, ReturnConditioning
from vla_dist.models.member import PolicyModel, PolicyModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class NoSettings:
    """Of an algorithm that has nothing to set."""


class Algorithm(nn.Module):
    """The model's own loss. Its parameters, if any, are trained beside the model's and never published.

    The train step calls, for each update::

        batch = algorithm.prepare(batch)
        loss, metrics = algorithm.loss(model, batch)     # once for each micro-batch
        algorithm.updated(parallel)                      # unless the gradient was not finite
    """

    Settings: ClassVar[type[Any]] = NoSettings
    """Frozen dataclass of what can be set."""

    def __init__(self, settings: Any, *, model: PolicyModelConfig, conditioning: ConditioningKind) -> None:
        """Raises ConfigError where the model or the conditioning is not what the algorithm is for."""
        super().__init__()
        self.settings = settings

    def set_normaliser(self, **scales: Tensor | None) -> None:
        """Take over the data's scales; the names are those of ``PolicyModel.set_normaliser``."""

    def prepare(self, batch: TrainBatch) -> TrainBatch:
        """The batch, still on the host, with what this algorithm adds."""
        return batch

    def loss(self, model: PolicyModel, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """What to minimise, and detached scalars; a mean over ``loss_count`` terms."""
        return model.loss(batch)

    def loss_count(self, model: PolicyModel, batch: TrainBatch) -> Tensor:
        """() float32: how many terms ``loss`` is the mean of."""
        return model.loss_count(batch)

    def updated(self, parallel: Parallel) -> None:
        """Take over what the update that has just ended brought. Blocking: every rank must call it."""

    def publishable(self, conditioning: ReturnConditioning) -> ReturnConditioning:
        """What a policy that is published now shall be asked for."""
        return conditioning

    def memory(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What it keeps of the data, for checkpoints, as tensors and as plain JSON; parameters and buffers are saved
        apart from it."""
        return {}, {}

    def load_memory(self, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Inverse of ``memory``."""
