"""What a robot's spec says about a member's config, whatever the member and its size."""

from typing import Any

from vla_dist.core.specs import EnvSpec


def robot_settings(spec: EnvSpec, *, head: str) -> dict[str, Any]:
    """Dimensions, cameras and the head of a member that looks at all there is.

    Args:
        head: for continuous actions; discrete ones have a head of their own.
    """
    return {
        "state_dim": spec.proprio_dim,
        "action_dim": spec.action_dim,
        "head": "discrete" if spec.action_kind == "discrete" else head,
        "cameras": [camera.name for camera in spec.cameras],
    }


def small_eyes(spec: EnvSpec) -> dict[str, Any] | None:
    """Settings of a VisualEncoder of four convolutions; None where there is nothing to look at."""
    return {"backbone": "conv_small", "output_dim": 128} if spec.cameras else None
