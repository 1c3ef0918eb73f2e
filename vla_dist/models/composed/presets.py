"""Named sizes of the composed VLA, each a function of the robot's spec."""

from collections.abc import Callable
from typing import Any

from vla_dist.core.specs import EnvSpec
from vla_dist.models.composed.vla import ComposedVLAConfig
from vla_dist.models.robot_settings import robot_settings


def _for_spec(spec: EnvSpec, head: str, size: dict[str, Any], changes: dict[str, Any]) -> ComposedVLAConfig:
    return ComposedVLAConfig(**{**robot_settings(spec, head=head), **size, **changes})


def tiny(spec: EnvSpec, **changes: Any) -> ComposedVLAConfig:
    """Seconds on a CPU: four convolutions where there is a camera, gated fusion, chunks of 4 actions."""
    size = {
        "horizon": 4,
        "hidden_dim": 64,
        "fusion_type": "gated_fusion",
        "fusion_heads": 4,
        "tokens_per_frame": 4,
        "visual": {"backbone": "conv_small", "width": 16},
    }
    return _for_spec(spec, "mse", size, changes)


def small(spec: EnvSpec, **changes: Any) -> ComposedVLAConfig:
    """Minutes on a CPU: a ResNet-18 of a quarter of the width, cross-attention, flow, chunks of 8, two frames."""
    trunk = {"embedding_size": 32, "hidden_sizes": [32, 32, 64, 128]}
    size = {
        "horizon": 8,
        "context_steps": 2,
        "hidden_dim": 128,
        "fusion_heads": 4,
        "visual": {"backbone": "resnet18", "trunk": trunk},
    }
    return _for_spec(spec, "flow", size, changes)


def full(spec: EnvSpec, **changes: Any) -> ComposedVLAConfig:
    """For a GPU: ResNet-50, a MiniLM that learns, cross-attention over its words, flow, chunks of 16, two frames."""
    size = {
        "horizon": 16,
        "context_steps": 2,
        "goal_dim": 0,
        "language": {"output_dim": 512, "freeze": False},
        "tokens_per_frame": 16,
        "visual": {"backbone": "resnet50", "image_size": 224, "resize": True},
    }
    return _for_spec(spec, "flow", size, changes)


PRESETS: dict[str, Callable[..., ComposedVLAConfig]] = {"tiny": tiny, "small": small, "full": full}
