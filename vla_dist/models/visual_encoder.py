"""Camera frames to features, with backbones chosen by name.

Shapes: B batch, T steps, C channels, N image tokens, F backbone features, D output features.
"""

from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTModel,
)
from transformers import initialization as init

from vla_dist.core.errors import ConfigError, DataError, ResourceMissing

Backbone = Literal["conv_small", "resnet18", "resnet50", "vit"]
_HUB_NAMES = {
    "resnet18": "microsoft/resnet-18",
    "resnet50": "microsoft/resnet-50",
    "vit": "google/vit-base-patch16-224-in21k",
}
_GROUPS = 8


class VisualEncoderConfig(PreTrainedConfig):
    """Settings of a VisualEncoder, as plain JSON.

    Attributes:
        backbone: ``conv_small`` (4 strided convolutions), ``resnet18``, ``resnet50`` or ``vit`` (ViT-B/16).
        output_dim: D.
        image_size: side in pixels that ``vit`` expects; the convolutional ones take any size.
        width: channels of the first layer of ``conv_small``, doubled by each of the next two.
        batch_norm: ``frozen`` keeps the statistics of pretrained weights fixed; ``group`` replaces batch norm by group
            norm, which is right for training from nothing on small batches.
        return_tokens: give (B, N, D) instead of the pooled (B, D).
        freeze: no gradient reaches the backbone.
    """

    model_type = "vla_visual_encoder"

    backbone: str = "resnet50"
    output_dim: int = 512
    image_size: int = 224
    width: int = 32
    batch_norm: str = "group"
    return_tokens: bool = False
    freeze: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.backbone not in get_args(Backbone):
            raise ConfigError(f"visual backbone {self.backbone!r} must be one of {', '.join(get_args(Backbone))}")
        if self.batch_norm not in ("group", "frozen"):
            raise ConfigError(f"batch_norm {self.batch_norm!r} must be 'group' or 'frozen'")
        if self.output_dim < 1 or self.width < _GROUPS or self.width % _GROUPS:
            raise ConfigError(f"output_dim {self.output_dim} must be positive and width {self.width} a multiple of 8")


class VisualEncoder(PreTrainedModel):
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
            config = VisualEncoderConfig(backbone=backbone, output_dim=output_dim, **settings)
        super().__init__(config)
        self.backbone, features = _build_backbone(config)
        self.project = nn.Linear(features, config.output_dim)
        self.register_buffer("pixel_mean", torch.full((1, 3, 1, 1), 0.5))
        self.register_buffer("pixel_std", torch.full((1, 3, 1, 1), 0.5))
        self.post_init()
        if pretrained:
            self._load_backbone(_HUB_NAMES.get(config.backbone, "") if pretrained is True else str(pretrained))
        if config.freeze:
            self.backbone.requires_grad_(False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
            init.zeros_(module.bias)
        elif isinstance(module, (nn.GroupNorm, nn.LayerNorm, nn.BatchNorm2d)):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    def _load_backbone(self, source: str) -> None:
        if not source:
            raise ConfigError(f"backbone {self.config.backbone!r} has no pretrained weights; use pretrained=False")
        kind = type(self.backbone)
        try:
            if kind is ViTModel:
                weights = ViTModel.from_pretrained(source, add_pooling_layer=False).state_dict()
            else:
                weights = ResNetModel.from_pretrained(source).state_dict()
        except OSError as error:
            raise ResourceMissing(
                f"no pretrained weights for {self.config.backbone!r} at {source!r} ({error}); give the path of a "
                "directory written by save_pretrained, or pretrained=False"
            ) from error
        if self.config.batch_norm == "group":
            weights = {name: value for name, value in weights.items() if "running_" not in name and "num_b" not in name}
        self.backbone.load_state_dict(weights)

    def train(self, mode: bool = True) -> "VisualEncoder":
        """Batch-norm statistics of pretrained weights stay as they are."""
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) or (B, T, 3, H, W), uint8 or float in [0, 1], to (B, D) or (B, T, D); tokens add N before D.

        Raises:
            DataError: another shape or type.
        """
        if images.ndim not in (4, 5) or images.shape[-3] != 3:
            raise DataError(f"images of shape {tuple(images.shape)} must be (B, 3, H, W) or (B, T, 3, H, W)")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise DataError(f"images are {images.dtype}; give uint8, or floats within [0, 1]")
        flat = images.reshape(-1, *images.shape[-3:]).to(self.project.weight.dtype)
        if images.dtype == torch.uint8:
            flat = flat / 255.0
        tokens = self._tokens((flat - self.pixel_mean) / self.pixel_std)
        features = self.project(tokens if self.config.return_tokens else tokens.mean(1))
        return features.reshape(*images.shape[:-3], *features.shape[1:])

    def _tokens(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) normalised to (B, N, F)."""
        if isinstance(self.backbone, ViTModel):
            return self.backbone(pixels).last_hidden_state
        output = self.backbone(pixels)
        grid = cast(Tensor, output if isinstance(output, Tensor) else output.last_hidden_state)
        return grid.flatten(2).transpose(1, 2)


def _build_backbone(config: VisualEncoderConfig) -> tuple[nn.Module, int]:
    if config.backbone == "conv_small":
        return _small_convolutions(config.width), 4 * config.width
    if config.backbone == "vit":
        vit = ViTModel(ViTConfig(image_size=config.image_size), add_pooling_layer=False)
        return vit, vit.config.hidden_size
    if config.backbone == "resnet18":
        settings = ResNetConfig(depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic")
    else:
        settings = ResNetConfig()
    resnet = ResNetModel(settings)
    if config.batch_norm == "group":
        _replace_batch_norm(resnet)
    return resnet, list(settings.hidden_sizes or ())[-1]


def _small_convolutions(width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for index, following in enumerate((width, 2 * width, 4 * width, 4 * width)):
        layers += [
            nn.Conv2d(channels, following, 5 if index == 0 else 3, stride=2, padding=2 if index == 0 else 1),
            nn.GroupNorm(_GROUPS, following),
            nn.ReLU(),
        ]
        channels = following
    return nn.Sequential(*layers)


def _replace_batch_norm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(32, child.num_features))
        else:
            _replace_batch_norm(child)


AutoConfig.register(VisualEncoderConfig.model_type, VisualEncoderConfig, exist_ok=True)
AutoModel.register(VisualEncoderConfig, VisualEncoder, exist_ok=True)
