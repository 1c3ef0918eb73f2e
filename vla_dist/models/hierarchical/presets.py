"""Named sizes of the hierarchical model, each a function of the robot's spec."""

from collections.abc import Callable, Mapping
from typing import Any

from vla_dist.core.specs import EnvSpec
from vla_dist.models.hierarchical.config import HierarchicalVLAConfig
from vla_dist.models.robot_settings import robot_settings, small_eyes


def _for_spec(spec: EnvSpec, size: dict[str, Any], changes: dict[str, Any]) -> HierarchicalVLAConfig:
    settings = {**robot_settings(spec, head="tanh"), "visual": small_eyes(spec)}
    return HierarchicalVLAConfig(**{**settings, **size, **changes})


def tiny(spec: EnvSpec, **changes: Any) -> HierarchicalVLAConfig:
    """Seconds on a CPU."""
    size = {"high_level_dim": 64, "low_level_dim": 64, "subgoal_dim": 16, "hidden_dim": 64, "context_steps": 8}
    return _for_spec(spec, {**size, "hold_steps": 4}, changes)


def small(spec: EnvSpec, **changes: Any) -> HierarchicalVLAConfig:
    """Minutes on a CPU."""
    size = {"high_level_dim": 128, "low_level_dim": 128, "subgoal_dim": 32, "hidden_dim": 256, "context_steps": 16}
    return _for_spec(spec, {**size, "hold_steps": 8}, changes)


def full(spec: EnvSpec, **changes: Any) -> HierarchicalVLAConfig:
    """For a GPU: wide levels, each with a ResNet of its own where there are cameras."""
    size: dict[str, Any] = {
        "high_level_dim": 512,
        "low_level_dim": 512,
        "subgoal_dim": 128,
        "hidden_dim": 1024,
        "context_steps": 32,
        "hold_steps": 10,
    }
    if spec.cameras:
        size["visual"] = {"backbone": "resnet18", "output_dim": 512}
    return _for_spec(spec, size, changes)


PRESETS: Mapping[str, Callable[..., HierarchicalVLAConfig]] = {"tiny": tiny, "small": small, "full": full}
