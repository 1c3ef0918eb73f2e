"""Named sizes of BC-Z, each a function of the robot's spec."""

import re
from collections.abc import Callable
from typing import Any

from vla_dist.core.specs import EnvSpec
from vla_dist.models.bcz.bcz import BCZConfig
from vla_dist.models.robot_settings import robot_settings

_GRIPPER = re.compile(r"grip|finger|jaw|suction")
_ROTATION = re.compile(r"rot|roll|pitch|yaw|angle|quat|orient|axis")


def action_parts(spec: EnvSpec) -> dict[str, list[int]]:
    """The three lists of BCZConfig by the names and units of the action's dimensions; what fits neither is position."""
    parts: dict[str, list[int]] = {"xyz_dims": [], "rotation_dims": [], "gripper_dims": []}
    for index, dimension in enumerate(spec.action):
        name = dimension.name.lower()
        if _GRIPPER.search(name):
            parts["gripper_dims"].append(index)
        elif _ROTATION.search(name) or dimension.unit.startswith("rad"):
            parts["rotation_dims"].append(index)
        else:
            parts["xyz_dims"].append(index)
    return parts


def _for_spec(spec: EnvSpec, size: dict[str, Any], changes: dict[str, Any]) -> BCZConfig:
    settings = {**robot_settings(spec, head="waypoints"), "state_dim": 0}
    if spec.action_kind == "continuous":
        settings |= action_parts(spec)
    return BCZConfig(**{**settings, **size, **changes})


def tiny(spec: EnvSpec, **changes: Any) -> BCZConfig:
    """Seconds on a CPU: four FiLM convolutions; it also feels proprio."""
    size = {
        "state_dim": spec.proprio_dim,
        "hidden_dim": 64,
        "visual": {"backbone": "conv_small", "width": 16, "output_dim": 64},
    }
    return _for_spec(spec, size, changes)


def small(spec: EnvSpec, **changes: Any) -> BCZConfig:
    """Minutes on a CPU: a FiLM ResNet-18 of a quarter of the width; it also feels proprio."""
    trunk = {"embedding_size": 32, "hidden_sizes": [32, 32, 64, 128]}
    size = {
        "state_dim": spec.proprio_dim,
        "visual": {"backbone": "resnet18", "trunk": trunk, "output_dim": 128},
    }
    return _for_spec(spec, size, changes)


def full(spec: EnvSpec, **changes: Any) -> BCZConfig:
    """For a GPU: FiLM ResNet-18 on frames of 100 x 100 as in the paper; proprio is not used."""
    size = {"visual": {"backbone": "resnet18", "image_size": 100, "resize": True, "output_dim": 512}}
    return _for_spec(spec, size, changes)


def clip(spec: EnvSpec, **changes: Any) -> BCZConfig:
    """For a GPU: the image and text embeddings of CLIP-B/32 in place of FiLM."""
    return _for_spec(spec, {"goal_dim": 0, "clip": {}}, changes)


PRESETS: dict[str, Callable[..., BCZConfig]] = {"tiny": tiny, "small": small, "full": full, "clip": clip}
