"""What a person asks of the zoo before choosing: sizes, what they cost in parameters and what they need."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from vla_dist.core.errors import ConfigError
from vla_dist.core.specs import CameraSpec, Dimension, EnvSpec
from vla_dist.models.zoo import Architecture

_CAMERA = CameraSpec(name="camera", height=224, width=224)


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueEntry:
    """One member in one size."""

    architecture: str
    preset: str
    num_parameters: int
    num_trainable: int
    """Those that training changes: what is frozen left out."""
    context_steps: int
    """K."""
    horizon: int
    """H."""
    head: str
    needs: tuple[str, ...]
    """Of ``camera``, ``language`` and ``returns``, those that it cannot do without in this size."""
    source: str
    """The paper."""


def reference_spec() -> EnvSpec:
    """The arm that parameters are counted for: Meta-World's 39 readings and 4 actions."""
    return EnvSpec(
        name="reference arm",
        proprio=tuple(Dimension(name=f"reading_{i}") for i in range(39)),
        action=tuple(Dimension(name=f"action_{i}", low=-1.0, high=1.0) for i in range(4)),
        control_hz=20.0,
        max_episode_steps=200,
    )


def catalogue(member: Architecture, spec: EnvSpec) -> list[CatalogueEntry]:
    """Every size of a member, built without memory for its weights.

    Args:
        spec: without cameras; a member that needs one gets one of 224 x 224 pixels.
    """
    return [_entry(member, name, spec) for name in member.presets]


def _entry(member: Architecture, preset: str, spec: EnvSpec) -> CatalogueEntry:
    needs_camera = not spec.cameras and not _can_build(member, preset, spec)
    config = member.configure(preset, replace(spec, cameras=(_CAMERA,)) if needs_camera else spec)
    with torch.device("meta"):
        parameters = list(member.model(config).parameters())
    return CatalogueEntry(
        architecture=member.name,
        preset=preset,
        num_parameters=sum(p.numel() for p in parameters),
        num_trainable=sum(p.numel() for p in parameters if p.requires_grad),
        context_steps=config.context_steps,
        horizon=config.horizon,
        head=config.head,
        needs=_needs(config, needs_camera),
        source=member.source,
    )


def _can_build(member: Architecture, preset: str, spec: EnvSpec) -> bool:
    try:
        member.configure(preset, spec)
    except ConfigError:
        return False
    return True


def _needs(config: Any, needs_camera: bool) -> tuple[str, ...]:
    wanted = {
        "camera": needs_camera,
        "language": getattr(config, "reads_words", bool(config.goal_dim)),
        "returns": bool(getattr(config, "use_returns", False)),
    }
    return tuple(name for name, is_wanted in wanted.items() if is_wanted)
