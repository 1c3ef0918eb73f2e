"""What a robot perceives at one step as one vector: normalised proprio, goal and camera views, summed.

Shapes: ... any leading dimensions, P proprio, G goal, D width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vla_dist.core.errors import DataError
from vla_dist.models.camera_views import CameraViews
from vla_dist.models.scales import InputScales


class StepEncoder(InputScales, CameraViews):
    """Each input has a projection of its own; those with zero dimensions take no part."""

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
        self.embed_state = nn.Linear(state_dim, output_dim) if state_dim else None
        self.embed_goal = nn.Linear(goal_dim, output_dim) if goal_dim else None
        self.register_views(cameras, visual, output_dim)
        self.register_scales(state_dim, goal_dim)

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
            total = total + self.embed_goal(self.normalised_goals(goals))
        return total if image_features is None else total + image_features
