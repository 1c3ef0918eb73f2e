"""Named sizes of RT-1, each a function of the robot's spec."""

from collections.abc import Callable
from typing import Any

from vla_dist.core.specs import EnvSpec
from vla_dist.models.language_encoder import BERT_BASE
from vla_dist.models.robot_settings import robot_settings
from vla_dist.models.rt1.rt1 import RT1Config


def _for_spec(spec: EnvSpec, size: dict[str, Any], changes: dict[str, Any]) -> RT1Config:
    settings = {**robot_settings(spec, head="bins"), "state_dim": 0}
    return RT1Config(**{**settings, **size, **changes})


def tiny(spec: EnvSpec, **changes: Any) -> RT1Config:
    """``rt1_tiny``, seconds on a CPU: four FiLM convolutions, 2 layers of width 64, 3 frames; it also feels proprio."""
    size = {
        "state_dim": spec.proprio_dim,
        "context_steps": 3,
        "hidden_dim": 64,
        "n_layers": 2,
        "n_heads": 4,
        "head_dim": 16,
        "dropout": 0.0,
        "tokens_per_frame": 4,
        "visual": {"backbone": "conv_small", "width": 16},
    }
    return _for_spec(spec, size, changes)


def small(spec: EnvSpec, **changes: Any) -> RT1Config:
    """Minutes on a CPU: a FiLM EfficientNet of half the width of B0, 4 layers of width 128, 6 frames."""
    size = {
        "state_dim": spec.proprio_dim,
        "hidden_dim": 128,
        "n_layers": 4,
        "n_heads": 4,
        "head_dim": 32,
        "visual": {
            "backbone": "efficientnet-b0",
            "trunk": {
                "width_coefficient": 0.5,
                "depth_coefficient": 0.5,
                "hidden_dim": 640,
                "drop_connect_rate": 0.0,
            },
        },
    }
    return _for_spec(spec, size, changes)


def full(spec: EnvSpec, **changes: Any) -> RT1Config:
    """``rt1``, for a GPU: the paper's sizes; frames are scaled to its 300 x 300, proprio is not used."""
    size = {"visual": {"backbone": "efficientnet-b3", "image_size": 300, "resize": True}}
    return _for_spec(spec, size, changes)


def vit(spec: EnvSpec, **changes: Any) -> RT1Config:
    """``rt1_vit``, for a GPU: ViT-B/16 and a BERT that learns, fused by cross-attention into one token a frame."""
    size = {
        "goal_dim": 0,
        "language": {"model_name": BERT_BASE, "output_dim": 512, "freeze": False},
        "conditioning": "fusion",
        "visual": {"backbone": "vit", "image_size": 224, "resize": True},
    }
    return _for_spec(spec, size, changes)


PRESETS: dict[str, Callable[..., RT1Config]] = {"tiny": tiny, "small": small, "full": full, "vit": vit}
