"""What a robot perceives at one step as one vector: normalised proprio, goal and camera views, summed.

Shapes: ... any leading dimensions, P proprio, G goal, D width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vla_dist.core.errors import DataError
from vla_dist.models.visual_encoder import VisualEncoder, VisualEncoderConfig

_LARGEST_NORMALISED = 10.0


class StepEncoder(nn.Module):
    """Each input has a projection of its own; those with zero dimensions take no part."""

    proprio_mean: Tensor
    proprio_std: Tensor
    goal_mean: Tensor
    goal_std: Tensor

    def __init__(
        self,
        *,
        state_dim: int,
        goal_dim: int,
        output_dim: int,
        cameras: Sequence[str] = (),
        visual: Mapping[str, Any] | None = None,
    ) -> None:
        """Args:
        visual: settings of the VisualEncoder that the cameras share.
        """
        super().__init__()
        self.output_dim = output_dim
        self.cameras = tuple(cameras)
        self.embed_state = nn.Linear(state_dim, output_dim) if state_dim else None
        self.embed_goal = nn.Linear(goal_dim, output_dim) if goal_dim else None
        self.visual = self.embed_views = None
        if cameras:
            self.visual = VisualEncoder(VisualEncoderConfig(**(visual or {})))
            features = self.visual.config.output_dim
            self.embed_views = nn.ModuleList(nn.Linear(features, output_dim) for _ in cameras)
        self.register_buffer("proprio_mean", torch.zeros(state_dim))
        self.register_buffer("proprio_std", torch.ones(state_dim))
        self.register_buffer("goal_mean", torch.zeros(goal_dim))
        self.register_buffer("goal_std", torch.ones(goal_dim))

    def encode_images(self, images: Mapping[str, Tensor]) -> Tensor | None:
        """camera name -> (..., 3, H, W) uint8 or float in [0, 1], to (..., D); None without cameras.

        Raises:
            DataError: a camera is missing.
        """
        if self.visual is None or self.embed_views is None:
            return None
        missing = [name for name in self.cameras if name not in images]
        if missing:
            raise DataError(f"images lack cameras {missing}; got {sorted(images) or 'none'}")
        views = [embed(self.visual(images[name])) for name, embed in zip(self.cameras, self.embed_views, strict=True)]
        return torch.stack(views).sum(0)

    def normalised(self, states: Tensor) -> Tensor:
        """(..., P) raw to (..., P): a reading far outside the training data must not drown every other input."""
        scaled = (states - self.proprio_mean) / self.proprio_std
        return scaled.clamp(-_LARGEST_NORMALISED, _LARGEST_NORMALISED)

    def forward(self, states: Tensor, goals: Tensor | None, image_features: Tensor | None = None) -> Tensor:
        """(..., P) raw and, where the encoder has them, (..., G) and (..., D) from ``encode_images``, to (..., D).

        Raises:
            DataError: an input is missing, is too many or has another size.
        """
        given = {"goals": goals is not None, "image features": image_features is not None}
        wanted = {"goals": self.embed_goal is not None, "image features": self.visual is not None}
        wrong = [f"{name} are {'given' if given[name] else 'missing'}" for name in given if given[name] != wanted[name]]
        if states.shape[-1] != len(self.proprio_mean):
            wrong.append(f"states of shape {tuple(states.shape)} must end in {len(self.proprio_mean)}")
        if goals is not None and wanted["goals"] and goals.shape[-1] != len(self.goal_mean):
            wrong.append(f"goals of shape {tuple(goals.shape)} must end in {len(self.goal_mean)}")
        if wrong:
            raise DataError(f"the inputs do not fit the model: {'; '.join(wrong)}")
        total = states.new_zeros(*states.shape[:-1], self.output_dim)
        if self.embed_state is not None:
            total = total + self.embed_state(self.normalised(states))
        if self.embed_goal is not None and goals is not None:
            total = total + self.embed_goal((goals - self.goal_mean) / self.goal_std)
        return total if image_features is None else total + image_features
