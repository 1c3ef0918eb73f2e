"""Camera frames to features, with backbones chosen by name.

Shapes: B batch, T steps, C channels, N image tokens, F backbone features, D output features.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, ViTModel
from transformers import initialization as init

from vla_dist.core.errors import ConfigError, DataError, ResourceMissing
from vla_dist.models.backbones import (
    HUB_NAMES,
    block_channels,
    build_backbone,
    feature_channels,
    feature_tokens,
    require_backbone,
)
from vla_dist.models.film import FiLM
from vla_dist.models.pixels import unit_pixels
from vla_dist.models.pretrained import WholePreTrainedModel
from vla_dist.models.settings import build_config

_GROUPS = 8


class VisualEncoderConfig(PreTrainedConfig):
    """Settings of a VisualEncoder, as plain JSON.

    Attributes:
        backbone: ``conv_small`` (4 strided convolutions), ``resnet18``, ``resnet50``, ``efficientnet-b0``,
            ``efficientnet-b3`` or ``vit`` (ViT-B/16 without its pooler).
        output_dim: D.
        image_size: side in pixels that ``vit`` sees, and all others with ``resize``.
        resize: scale frames to ``image_size`` first. Without it the convolutional backbones take any size and ``vit``
            refuses all but its own.
        width: channels of the first layer of ``conv_small``, doubled by each of the next two.
        trunk: changes to the backbone's own transformers config, for another size than the published one.
        batch_norm: ``frozen`` keeps the statistics of pretrained weights fixed; ``group`` replaces batch norm by group
            norm, which is right for training from nothing on small batches.
        condition_dim: size of the vector that modulates every block by FiLM; 0: none.
        return_tokens: give (B, N, D) instead of the pooled (B, D).
        freeze: no gradient reaches the backbone, and it stays in eval mode.
    """

    model_type = "vla_visual_encoder"

    backbone: str = "resnet50"
    output_dim: int = 512
    image_size: int = 224
    width: int = 32
    batch_norm: str = "group"
    return_tokens: bool = False
    freeze: bool = False
    resize: bool = False
    trunk: dict[str, Any] | None = None
    condition_dim: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        require_backbone(self.backbone)
        if self.batch_norm not in ("group", "frozen"):
            raise ConfigError(f"batch_norm {self.batch_norm!r} must be 'group' or 'frozen'")
        if self.output_dim < 1 or self.width < _GROUPS or self.width % _GROUPS:
            raise ConfigError(f"output_dim {self.output_dim} must be positive and width {self.width} a multiple of 8")
        if self.image_size < 1 or self.condition_dim < 0:
            raise ConfigError(
                f"image_size {self.image_size} must be positive, condition_dim {self.condition_dim} at least 0"
            )


class VisualEncoder(WholePreTrainedModel):
    """Normalises inside; rows do not depend on each other, so features of past frames can be kept."""

    config_class = VisualEncoderConfig
    config: VisualEncoderConfig
    base_model_prefix = "visual_encoder"
    main_input_name = "images"
    _supports_sdpa = True

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        backbone: str | VisualEncoderConfig = "resnet50",
        pretrained: bool | str = False,
        output_dim: int = 512,
        **settings: Any,
    ) -> None:
        """Build from a backbone's name, or from a config given in its place.

        Args:
            pretrained: a local directory or hub name to take the backbone's weights from; True: its usual hub name.
                The pixel statistics that lie beside the weights are taken too.
            settings: any further field of VisualEncoderConfig.

        Raises:
            ConfigError: an unknown backbone.
            ResourceMissing: the pretrained weights are neither on disk nor reachable.
        """
        if isinstance(backbone, VisualEncoderConfig):
            config = backbone
        else:
            if pretrained:
                settings.setdefault("batch_norm", "frozen")
            config = build_config(VisualEncoderConfig, settings, backbone=backbone, output_dim=output_dim)
        super().__init__(config)
        self.backbone = build_backbone(
            config.backbone,
            width=config.width,
            image_size=config.image_size,
            changes=config.trunk or {},
            norm=config.batch_norm,
        )
        self.films = None
        if config.condition_dim:
            self.films = nn.ModuleList(FiLM(config.condition_dim, c) for c in block_channels(self.backbone))
        self.project = nn.Linear(feature_channels(self.backbone), config.output_dim)
        self.register_buffer("pixel_mean", torch.full((1, 3, 1, 1), 0.5))
        self.register_buffer("pixel_std", torch.full((1, 3, 1, 1), 0.5))
        self.post_init()
        if pretrained:
            self.load_backbone(pretrained)
        if config.freeze:
            self.backbone.requires_grad_(False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, FiLM):
            module.reset_parameters()
        elif isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
            init.zeros_(module.bias)
        elif isinstance(module, (nn.GroupNorm, nn.LayerNorm, nn.BatchNorm2d)):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    def load_backbone(self, pretrained: bool | str) -> None:
        """Take the backbone's weights, and the pixel statistics beside them, as the constructor does.

        Raises:
            ResourceMissing: nothing there.
            ConfigError: this backbone has no published weights, or those are of another shape.
        """
        source = HUB_NAMES.get(self.config.backbone, "") if pretrained is True else str(pretrained)
        if not source or not isinstance(self.backbone, PreTrainedModel):
            raise ConfigError(f"backbone {self.config.backbone!r} has no pretrained weights; use pretrained=False")
        kind = type(self.backbone)
        extra: dict[str, Any] = {"add_pooling_layer": False} if kind is ViTModel else {}
        try:
            weights = kind.from_pretrained(source, use_safetensors=True, **extra).state_dict()
        except OSError as error:
            raise ResourceMissing(
                f"no pretrained weights for {self.config.backbone!r} at {source!r} ({error}); give the path of a "
                "directory written by save_pretrained, or pretrained=False"
            ) from error
        if self.config.batch_norm == "group":
            weights = {name: value for name, value in weights.items() if "running_" not in name and "num_b" not in name}
        try:
            self.backbone.load_state_dict(weights)
        except RuntimeError as error:
            raise ConfigError(
                f"the weights at {source!r} do not fit backbone {self.config.backbone!r} with trunk "
                f"{self.config.trunk or {}}: {error}"
            ) from error
        self._take_pixel_statistics(Path(source) / "preprocessor_config.json")

    def _take_pixel_statistics(self, path: Path) -> None:
        """What the weights were trained on: the directory's own word, else the custom of the backbone's authors."""
        # ImageNet's, but for google/vit-base-patch16-224-in21k, which was trained on [-1, 1].
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        if self.config.backbone == "vit":
            mean = std = [0.5] * 3
        if path.is_file():
            stated = json.loads(path.read_text())
            mean, std = stated.get("image_mean", mean), stated.get("image_std", std)
        self.pixel_mean.copy_(torch.tensor(mean).view(1, 3, 1, 1))
        self.pixel_std.copy_(torch.tensor(std).view(1, 3, 1, 1))

    def train(self, mode: bool = True) -> "VisualEncoder":
        """Batch-norm statistics of pretrained weights stay as they are; a frozen backbone stays in eval mode."""
        super().train(mode)
        if self.config.freeze:
            self.backbone.eval()
        for module in self.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, images: Tensor, condition: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) or (B, T, 3, H, W), uint8 or float in [0, 1], to (B, D) or (B, T, D); tokens add N before D.

        Args:
            condition: (B, condition_dim) for all steps of a row, where the config has a ``condition_dim``.

        Raises:
            DataError: another shape or type, or a condition where none is taken, or none where one is.
        """
        if images.ndim not in (4, 5) or images.shape[-3] != 3:
            raise DataError(f"images of shape {tuple(images.shape)} must be (B, 3, H, W) or (B, T, 3, H, W)")
        if (condition is None) != (self.films is None):
            raise DataError(
                f"condition_dim is {self.config.condition_dim} but a condition is "
                f"{'absent' if condition is None else 'given'}"
            )
        flat = unit_pixels(images.reshape(-1, *images.shape[-3:]), self.project.weight.dtype)
        pixels = (self._resized(flat) - self.pixel_mean) / self.pixel_std
        if condition is not None:
            if condition.shape != (len(images), self.config.condition_dim):
                raise DataError(
                    f"condition of shape {tuple(condition.shape)} must be ({len(images)}, {self.config.condition_dim})"
                )
            condition = condition.repeat_interleave(len(flat) // max(1, len(images)), 0)

        def modulate(index: int, grid: Tensor) -> Tensor:
            return grid if self.films is None or condition is None else self.films[index](grid, condition)

        tokens = feature_tokens(self.backbone, pixels, modulate)
        features = self.project(tokens if self.config.return_tokens else tokens.mean(1))
        return features.reshape(*images.shape[:-3], *features.shape[1:])

    def _resized(self, flat: Tensor) -> Tensor:
        size = (self.config.image_size,) * 2
        if tuple(flat.shape[-2:]) == size:
            return flat
        if self.config.resize:
            return cast(Tensor, interpolate(flat, size, mode="bilinear", antialias=True, align_corners=False))
        if isinstance(self.backbone, ViTModel):
            raise DataError(
                f"frames of {tuple(flat.shape[-2:])} pixels, but this 'vit' sees {size}; set resize=True or image_size"
            )
        return flat


def require_visual(settings: Mapping[str, Any] | None) -> None:
    """Raises ConfigError where a VisualEncoder of these settings could not be built, as far as that shows so early."""
    build_config(VisualEncoderConfig, settings or {})


def build_visual_encoder(settings: Mapping[str, Any] | None, **others: Any) -> VisualEncoder:
    """An encoder with fresh weights, by its settings and others that go before them.

    Raises:
        ConfigError: a setting that does not exist or cannot work.
    """
    return VisualEncoder(build_config(VisualEncoderConfig, settings or {}, **others))


AutoConfig.register(VisualEncoderConfig.model_type, VisualEncoderConfig, exist_ok=True)
AutoModel.register(VisualEncoderConfig, VisualEncoder, exist_ok=True)
