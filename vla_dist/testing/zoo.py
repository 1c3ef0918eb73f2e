"""Every member of the zoo in every form that its smallest preset allows, for suites that hold for all of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from vla_dist.core.errors import ConfigError
from vla_dist.core.protocols import Policy
from vla_dist.core.specs import CameraSpec, EnvSpec
from vla_dist.core.types import Array, Observation
from vla_dist.models.actions import ActionCodec
from vla_dist.models.batch import TrainBatch
from vla_dist.models.conditioning import ReturnConditioning
from vla_dist.models.goals import GoalTable
from vla_dist.models.zoo import ARCHITECTURES, Architecture
from vla_dist.testing.fakes import make_spec
from vla_dist.testing.windows import make_train_batch

_CAMERA = CameraSpec(name="top", height=32, width=32)
_CONTINUOUS_HEADS = ("tanh", "mse", "gaussian", "bins", "flow")
_WORDS = ("open the drawer", "close the drawer", "press the button", "push it left")


@dataclass(frozen=True, slots=True, kw_only=True)
class ZooCase:
    """One member built for one kind of robot."""

    name: str
    architecture: Architecture
    spec: EnvSpec
    config: Any
    """Of the preset ``tiny``."""

    @property
    def image_size(self) -> tuple[int, int]:
        return _CAMERA.height, _CAMERA.width

    def build(self, *, seed: int = 0) -> Any:
        """The model in eval mode; its parameters are moved a little, as some start at zero and so hide what follows."""
        torch.manual_seed(seed)
        model = self.architecture.model(self.config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        return model.eval()

    def build_policy(self, model: Any) -> Policy[Any]:
        return self.architecture.policy(model, self.spec, conditioning=ReturnConditioning(), goals=self.goals())

    def goals(self) -> GoalTable | None:
        return GoalTable(self.embed) if self.config.goal_dim else None

    def embed(self, texts: Sequence[str]) -> Array:
        """(B, G) float32, a vector of its own for each text."""
        size = self.config.goal_dim
        return np.stack([np.random.default_rng(list(t.encode())).normal(size=size) for t in texts]).astype(np.float32)

    def batch(self, *, num_windows: int = 4, seed: int = 0) -> TrainBatch:
        return make_train_batch(
            self.config,
            num_windows=num_windows,
            state_dim=self.spec.proprio_dim,
            image_size=self.image_size,
            seed=seed,
        )

    def observation(self, seed: int, *, is_first: bool = False) -> Observation:
        """Reproducible noise in the words of ``seed % 4``; every one but an episode's first tells the last action."""
        rng = np.random.default_rng(seed)
        executed = ActionCodec.of(self.spec).decode(rng.uniform(-1, 1, self.spec.action_dim))
        return Observation(
            proprio=rng.normal(size=self.spec.proprio_dim).astype(np.float32),
            instruction=_WORDS[seed % len(_WORDS)],
            images={
                camera.name: rng.integers(0, 256, (camera.height, camera.width, 3), dtype=np.uint8)
                for camera in self.spec.cameras
            },
            previous_action=None if is_first else executed,
        )


def zoo_cases() -> list[ZooCase]:
    """Each member: continuous with each of its heads, discrete, of chunks and with a camera; what can be built."""
    cases = []
    for member in ARCHITECTURES.values():
        plain = make_spec(action_dim=4)
        if not _can_build(member, plain):
            plain = replace(plain, cameras=(_CAMERA,))
        variants: dict[str, tuple[EnvSpec, dict[str, Any]]] = {"default": (plain, {})}
        default_head = member.configure("tiny", plain).head
        for head in _CONTINUOUS_HEADS:
            if head != default_head and _can_build(member, plain, head=head):
                variants[head] = (plain, {"head": head})
        discrete = replace(plain, action_kind="discrete")
        if _can_build(member, discrete):
            variants["discrete"] = (discrete, {})
        chunks = {"horizon": 3, "context_steps": 3}
        if _can_build(member, plain, **chunks):
            variants["chunks"] = (plain, chunks)
        if not plain.cameras and _can_build(member, replace(plain, cameras=(_CAMERA,))):
            variants["camera"] = (replace(plain, cameras=(_CAMERA,)), {})
        cases += [
            ZooCase(
                name=f"{member.name}-{name}",
                architecture=member,
                spec=spec,
                config=member.configure("tiny", spec, **changes),
            )
            for name, (spec, changes) in variants.items()
        ]
    return cases


def _can_build(member: Architecture, spec: EnvSpec, **changes: Any) -> bool:
    try:
        member.configure("tiny", spec, **changes)
    except ConfigError:
        return False
    return True
