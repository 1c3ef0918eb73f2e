"""Named sizes of the memory-augmented model, each a function of the robot's spec."""

from collections.abc import Callable, Mapping
from typing import Any

from vla_dist.core.specs import EnvSpec
from vla_dist.models.memory.memory_vla import MemoryAugmentedVLAConfig
from vla_dist.models.robot_settings import robot_settings, small_eyes


def _for_spec(spec: EnvSpec, size: dict[str, Any], changes: dict[str, Any]) -> MemoryAugmentedVLAConfig:
    settings = {**robot_settings(spec, head="tanh"), "visual": small_eyes(spec)}
    return MemoryAugmentedVLAConfig(**{**settings, **size, **changes})


def tiny(spec: EnvSpec, **changes: Any) -> MemoryAugmentedVLAConfig:
    """Seconds on a CPU."""
    size = {"memory_size": 24, "memory_dim": 32, "num_heads": 2, "context_steps": 16}
    return _for_spec(spec, size, changes)


def small(spec: EnvSpec, **changes: Any) -> MemoryAugmentedVLAConfig:
    """Minutes on a CPU."""
    size = {"memory_size": 50, "memory_dim": 128, "num_heads": 4, "context_steps": 16}
    return _for_spec(spec, size, changes)


def full(spec: EnvSpec, **changes: Any) -> MemoryAugmentedVLAConfig:
    """The course chapter's 100 slots of 512."""
    size: dict[str, Any] = {
        "memory_size": 100,
        "memory_dim": 512,
        "num_heads": 8,
        "context_steps": 32,
        "burn_in_steps": 8,
    }
    if spec.cameras:
        size["visual"] = {"backbone": "resnet18", "output_dim": 512}
    return _for_spec(spec, size, changes)


PRESETS: Mapping[str, Callable[..., MemoryAugmentedVLAConfig]] = {"tiny": tiny, "small": small, "full": full}
