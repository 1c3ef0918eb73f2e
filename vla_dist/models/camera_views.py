"""All cameras of a step as one vector.

Shapes: ... any leading dimensions, D width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vla_dist.core.errors import DataError
from vla_dist.models.visual_encoder import VisualEncoder, build_visual_encoder


class CameraViews(nn.Module):
    """An encoder that the cameras share and a projection for each, in the module that inherits this."""

    visual: VisualEncoder | None
    embed_views: nn.ModuleList | None
    view_names: tuple[str, ...]

    def register_views(self, cameras: Sequence[str], visual: Mapping[str, Any] | None, width: int) -> None:
        """Args:
            cameras: names of the views; none: there is nothing to encode.
            visual: settings of the VisualEncoder.

        Raises:
            ConfigError: a setting that does not exist or cannot work.
        """
        self.view_names = tuple(cameras)
        self.visual = self.embed_views = None
        if cameras:
            self.visual = build_visual_encoder(visual)
            features = self.visual.config.output_dim
            self.embed_views = nn.ModuleList(nn.Linear(features, width) for _ in cameras)

    def encode_images(self, images: Mapping[str, Tensor]) -> Tensor | None:
        """camera name -> (..., 3, H, W) uint8 or float in [0, 1], to (..., D); None without cameras.

        Raises:
            DataError: a camera is missing, or there are images that nobody looks at.
        """
        if self.visual is None or self.embed_views is None:
            if images:
                raise DataError(f"this model was built without cameras, got images of {sorted(images)}; pass none")
            return None
        missing = [name for name in self.view_names if name not in images]
        if missing:
            raise DataError(f"images lack cameras {missing}; got {sorted(images) or 'none'}")
        pairs = zip(self.view_names, self.embed_views, strict=True)
        return torch.stack([embed(self.visual(images[name])) for name, embed in pairs]).sum(0)
