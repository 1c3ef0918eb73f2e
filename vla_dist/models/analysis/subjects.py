"""A member in one size on a robot, built to be measured.

Shapes: B windows, K context steps, H horizon, P proprio, A action, G goal.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from vla_dist.core.errors import ConfigError
from vla_dist.core.protocols import Policy
from vla_dist.core.specs import CameraSpec, EnvSpec
from vla_dist.core.types import Array, Observation
from vla_dist.models.batch import TrainBatch
from vla_dist.models.catalogue import reference_spec
from vla_dist.models.conditioning import ReturnConditioning
from vla_dist.models.goals import GoalTable
from vla_dist.models.zoo import Architecture

_CAMERA = CameraSpec(name="camera", height=224, width=224)
_WORDS = "open the drawer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is measured."""

    member: Architecture
    preset: str
    spec: EnvSpec
    config: Any

    @property
    def name(self) -> str:
        return f"{self.member.name}/{self.preset}"

    def build(self) -> Any:
        """The model with random weights, in eval mode."""
        return self.member.model(self.config).eval()

    def build_policy(self, model: Any) -> Policy[Any]:
        """Over a table of goals that knows the one instruction used here, so that no language model is loaded."""
        goals = None
        if self.config.goal_dim:
            vector = np.linspace(-1, 1, self.config.goal_dim, dtype=np.float32)[None]
            goals = GoalTable(_refuse, instructions=[_WORDS], embeddings=vector)
        return self.member.policy(model, self.spec, conditioning=ReturnConditioning(), goals=goals)

    def observation(self) -> Observation:
        rng = np.random.default_rng(0)
        return Observation(
            proprio=rng.normal(size=self.spec.proprio_dim).astype(np.float32),
            instruction=_WORDS,
            images={c.name: rng.integers(0, 256, (c.height, c.width, 3), np.uint8) for c in self.spec.cameras},
        )

    def batch(self, num_windows: int) -> TrainBatch:
        """Whole windows of noise."""
        config, rng = self.config, np.random.default_rng(0)
        num, steps, horizon, size = num_windows, config.context_steps, config.horizon, config.action_dim
        targets = torch.from_numpy(rng.uniform(-0.9, 0.9, (num, steps + horizon - 1, size)).astype(np.float32))
        if config.head == "discrete":
            targets = torch.nn.functional.one_hot(targets.argmax(-1), size).float()
        readings = rng.normal(size=(num, steps, self.spec.proprio_dim)).astype(np.float32)
        return TrainBatch(
            states=torch.from_numpy(readings),
            actions=targets[:, :steps],
            target_actions=targets[:, :steps],
            returns_to_go=torch.zeros(num, steps),
            timesteps=torch.arange(steps).repeat(num, 1),
            padding_mask=torch.ones(num, steps, dtype=torch.bool),
            target_chunks=targets[:, steps - 1 :],
            chunk_mask=torch.ones(num, horizon, dtype=torch.bool),
            instructions=(_WORDS,) * num,
            tasks=(_task_of(config),) * num,
            success=torch.ones(num, dtype=torch.bool),
            interventions=torch.zeros(num, steps, dtype=torch.bool),
            goals=torch.randn(num, config.goal_dim) if config.goal_dim else None,
            images={
                camera.name: torch.from_numpy(
                    rng.integers(0, 256, (num, steps, 3, camera.height, camera.width), np.uint8)
                )
                for camera in self.spec.cameras
            },
        )


def subject(member: Architecture, preset: str, spec: EnvSpec | None = None, **changes: Any) -> Subject:
    """A member in a size, with changes.

    Args:
        spec: the robot; None: the reference arm, with one camera of 224 x 224 pixels where the member needs one.

    Raises:
        ConfigError: no such size or setting, or one that does not fit the robot.
    """
    if spec is not None:
        return Subject(member=member, preset=preset, spec=spec, config=member.configure(preset, spec, **changes))
    plain = reference_spec()
    try:
        return Subject(member=member, preset=preset, spec=plain, config=member.configure(preset, plain, **changes))
    except ConfigError:
        seeing = replace(plain, cameras=(_CAMERA,))
        return Subject(member=member, preset=preset, spec=seeing, config=member.configure(preset, seeing, **changes))


def _task_of(config: Any) -> str:
    """One that a member with named skills learns from."""
    skills: Sequence[str] = getattr(config, "skills", None) or ()
    return skills[0] if skills else "analysis"


def _refuse(texts: Any) -> Array:
    raise ConfigError(f"an analysis uses one instruction only, not {list(texts)}")
