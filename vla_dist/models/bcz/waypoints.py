"""BC-Z's action head: waypoints of position, rotation and gripper, each with a loss of its own.

Shapes: B batch, H waypoints, A action, D features.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, huber_loss

from vla_dist.models.heads import ActionHead
from vla_dist.models.member import masked_mean

WEIGHTS = {"xyz": 100.0, "rotation": 10.0, "gripper": 0.5}
"""Source: Jang et al. 2021, BC-Z, section 5.2: Huber, Huber and log loss."""


def two_layers(features: int, hidden: int) -> nn.Sequential:
    """The paper's two hidden layers before each output."""
    return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())


class WaypointHead(ActionHead):
    """One MLP for each part of the action that the robot has.

    The gripper is the probability of being at its upper bound; a command in between is a probability in between.
    """

    def __init__(self, features: int, horizon: int, parts: Mapping[str, Sequence[int]], hidden: int) -> None:
        """Args:
        parts: ``xyz``, ``rotation`` and ``gripper`` to the dimensions of the action that belong to it; together all.
        """
        indices = [index for dims in parts.values() for index in dims]
        super().__init__(features, horizon, len(indices))
        self.parts = {name: list(dims) for name, dims in parts.items() if dims}
        self.branches = nn.ModuleDict(
            {
                name: nn.Sequential(*two_layers(features, hidden), nn.Linear(hidden, horizon * len(dims)))
                for name, dims in self.parts.items()
            }
        )
        self.order = [indices.index(dimension) for dimension in range(len(indices))]

    def _outputs(self, features: Tensor) -> dict[str, Tensor]:
        """part -> (B, H, dimensions): positions and rotations as they are, the gripper as a logit."""
        return {name: branch(features).unflatten(-1, (self.horizon, -1)) for name, branch in self.branches.items()}

    def loss(
        self, features: Tensor, targets: Tensor, mask: Tensor, weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        total, metrics = targets.new_zeros(()), {}
        outputs = self._outputs(features)
        for name, output in outputs.items():
            wanted = targets[..., self.parts[name]]
            error = _log_loss(output, wanted) if name == "gripper" else huber_loss(output, wanted, reduction="none")
            part = masked_mean(error.mean(-1), mask, weights)
            metrics[f"{name}_loss"] = part.detach()
            total = total + WEIGHTS[name] * part
        error = (self._assembled(outputs).detach() - targets).abs().mean(-1)
        return total, {**metrics, "action_error": masked_mean(error, mask)}

    def decode(self, features: Tensor, generator: np.random.Generator | None = None) -> Tensor:
        return self._assembled(self._outputs(features))

    def _assembled(self, outputs: dict[str, Tensor]) -> Tensor:
        """(B, H, A) in [-1, 1], dimensions in the robot's order."""
        # tanh(x / 2) is the expected command: 2 sigmoid(x) - 1.
        parts = [(0.5 * out).tanh() if name == "gripper" else out.clamp(-1.0, 1.0) for name, out in outputs.items()]
        return torch.cat(parts, -1)[..., self.order]


def _log_loss(logits: Tensor, commands: Tensor) -> Tensor:
    """Log loss above its smallest possible value, which is 0 for commands at their bounds."""
    likely = (0.5 * (commands + 1.0)).clamp(0.0, 1.0)
    floor = -(torch.xlogy(likely, likely) + torch.xlogy(1.0 - likely, 1.0 - likely))
    return binary_cross_entropy_with_logits(logits, likely, reduction="none") - floor
