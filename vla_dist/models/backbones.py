"""Networks that turn pixels into a grid of features, by name, with a seam after every block.

Shapes: B frames, C channels, h w the grid.
"""

import math
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn
from transformers import EfficientNetConfig, EfficientNetModel, ResNetConfig, ResNetModel, ViTConfig, ViTModel

from vla_dist.core.errors import ConfigError
from vla_dist.models.settings import config_errors, did_you_mean, require_heads

Modulate = Callable[[int, Tensor], Tensor]
"""(index of a block, its output (B, C, h, w)) to what goes on from there."""

CONV_SMALL = "conv_small"
_CONV_GROUPS = 8

# Width, depth, features and the blocks padded alike on both sides, of the published TensorFlow weights.
# Source: Tan & Le 2019, "EfficientNet", section 4 and table 1.
_EFFICIENTNETS: dict[str, dict[str, Any]] = {
    "efficientnet-b0": {
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
        "hidden_dim": 1280,
        "image_size": 224,
        "depthwise_padding": [16],
    },
    "efficientnet-b3": {
        "width_coefficient": 1.2,
        "depth_coefficient": 1.4,
        "hidden_dim": 1536,
        "image_size": 300,
        "depthwise_padding": [5, 18],
    },
}
_RESNETS: dict[str, dict[str, Any]] = {
    "resnet18": {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"},
    "resnet50": {},
}
BACKBONES = (CONV_SMALL, *_RESNETS, *_EFFICIENTNETS, "vit")
HUB_NAMES = {
    "resnet18": "microsoft/resnet-18",
    "resnet50": "microsoft/resnet-50",
    "efficientnet-b0": "google/efficientnet-b0",
    "efficientnet-b3": "google/efficientnet-b3",
    "vit": "google/vit-base-patch16-224-in21k",
}


def require_backbone(name: str) -> None:
    """Raises ConfigError for an unknown name, with the nearest one."""
    if name not in BACKBONES:
        hint = did_you_mean(name, BACKBONES)
        raise ConfigError(f"visual backbone {name!r} is unknown; {hint}it must be one of {', '.join(BACKBONES)}")


def build_backbone(name: str, *, width: int, image_size: int, changes: dict[str, Any], norm: str) -> nn.Module:
    """A backbone with fresh weights.

    Args:
        width: first channels of ``conv_small``.
        image_size: side in pixels of what ``vit`` sees.
        changes: fields of the backbone's own transformers config, for another size than the published one.
        norm: ``group`` or ``frozen``.

    Raises:
        ConfigError: the name or a change is unknown.
    """
    require_backbone(name)
    if name == CONV_SMALL:
        if changes:
            raise ConfigError(f"{CONV_SMALL} has no settings {sorted(changes)} but its width")
        return _small_convolutions(width)
    with config_errors(f"backbone {name!r} with trunk {changes}"):
        backbone = _published(name, image_size, changes)
    if norm == "group":
        _replace_batch_norm(backbone)
    return backbone


def _published(name: str, image_size: int, changes: dict[str, Any]) -> nn.Module:
    if name == "vit":
        config = _config(ViTConfig, name, {"image_size": image_size, **changes})
        require_heads("hidden_size of backbone 'vit'", config.hidden_size, config.num_attention_heads)
        return ViTModel(config, add_pooling_layer=False)
    if name in _RESNETS:
        return ResNetModel(_config(ResNetConfig, name, {**_RESNETS[name], **changes}))
    return EfficientNetModel(_config(EfficientNetConfig, name, {**_EFFICIENTNETS[name], **changes}))


def feature_channels(backbone: nn.Module) -> int:
    """C of what ``feature_tokens`` gives."""
    if isinstance(backbone, ViTModel):
        return backbone.config.hidden_size
    if isinstance(backbone, EfficientNetModel):
        return backbone.encoder.top_conv.out_channels
    return block_channels(backbone)[-1]


def block_channels(backbone: nn.Module) -> list[int]:
    """C after each block, the places where FiLM may act.

    Raises:
        ConfigError: a transformer, which has no such places.
    """
    if isinstance(backbone, EfficientNetModel):
        return [block.projection.project_conv.out_channels for block in _mbconv_blocks(backbone)]
    if isinstance(backbone, ResNetModel):
        return [block.layer[-1].convolution.out_channels for block in _residual_blocks(backbone)]
    if isinstance(backbone, ViTModel):
        raise ConfigError("FiLM modulates convolutional backbones; with 'vit' fuse tokens instead")
    return [layer.out_channels for layer in backbone.children() if isinstance(layer, nn.Conv2d)]


def feature_tokens(backbone: nn.Module, pixels: Tensor, modulate: Modulate) -> Tensor:
    """(B, 3, H, W) normalised pixels to (B, h * w, C); ``vit`` puts its class token first."""
    if isinstance(backbone, ViTModel):
        return cast(Tensor, backbone(pixels).last_hidden_state)
    if isinstance(backbone, EfficientNetModel):
        grid = backbone.embeddings(pixels)
        for index, block in enumerate(_mbconv_blocks(backbone)):
            grid = modulate(index, block(grid))
        encoder = backbone.encoder
        grid = encoder.top_activation(encoder.top_bn(encoder.top_conv(grid)))
    elif isinstance(backbone, ResNetModel):
        grid = backbone.embedder(pixels)
        for index, block in enumerate(_residual_blocks(backbone)):
            # Inside the residual branch: what the shortcut carries stays as it is.
            grid = block.activation(modulate(index, block.layer(grid)) + block.shortcut(grid))
    else:
        grid, index = pixels, 0
        for layer in cast(nn.Sequential, backbone):
            if isinstance(layer, nn.ReLU):
                grid = modulate(index, grid)
                index += 1
            grid = layer(grid)
    return grid.flatten(2).transpose(1, 2)


def _mbconv_blocks(backbone: EfficientNetModel) -> list[Any]:
    return list(backbone.encoder.blocks)


def _residual_blocks(backbone: ResNetModel) -> list[Any]:
    return [block for stage in backbone.encoder.stages for block in cast(Any, stage).layers]


def _config(kind: type[Any], name: str, settings: dict[str, Any]) -> Any:
    known = kind()
    unknown = sorted(key for key in settings if not hasattr(known, key))
    if unknown:
        raise ConfigError(f"backbone {name!r} has no settings {unknown}; see transformers.{kind.__name__}")
    return kind(**settings)


def _small_convolutions(width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for index, following in enumerate((width, 2 * width, 4 * width, 4 * width)):
        layers += [
            nn.Conv2d(channels, following, 5 if index == 0 else 3, stride=2, padding=2 if index == 0 else 1),
            nn.GroupNorm(_CONV_GROUPS, following),
            nn.ReLU(),
        ]
        channels = following
    return nn.Sequential(*layers)


def _replace_batch_norm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            groups = math.gcd(32, child.num_features)
            setattr(module, name, nn.GroupNorm(groups, child.num_features))
        else:
            _replace_batch_norm(child)
