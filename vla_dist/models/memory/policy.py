"""The memory-augmented model as a pure policy: the bank travels in the state.

Shapes: B rows, M slots, D width, A action.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Array, Observation
from vla_dist.models.actions import ActionCodec
from vla_dist.models.conditioning import ReturnConditioning
from vla_dist.models.goals import GoalTable
from vla_dist.models.memory.bank import EpisodicMemory
from vla_dist.models.memory.memory_vla import MemoryAugmentedVLA
from vla_dist.models.observations import camera_frames, goal_rows, proprio_rows, require_fit


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MemoryState:
    """One episode's bank; read-only arrays that can be stored and sent as they are."""

    contents: Array
    """(M, D) float32."""
    strengths: Array
    """(M,) float32."""
    ages: Array
    """(M,) float32, steps."""
    valid: Array
    """(M,) bool."""


class MemoryPolicy:
    """Remembers a whole episode, however long.

    So K observations rebuild its state only approximately: what was written before them is lost. Whoever moves an
    episode to another process carries the state itself, which is four arrays.
    """

    def __init__(
        self,
        model: MemoryAugmentedVLA,
        spec: EnvSpec,
        *,
        conditioning: ReturnConditioning,
        goals: GoalTable | None,
    ) -> None:
        """Args:
            conditioning: not used; this member has no return token.
            goals: needed where the model has a goal_dim.

        Raises:
            ConfigError: the model's dimensions, head, cameras or language differ from what the spec needs.
        """
        del conditioning
        require_fit(model.config, spec, has_goals=goals is not None)
        self._model = model.eval()
        self._spec = spec
        self._goals = goals
        self._codec = ActionCodec.of(spec)
        self._device = next(model.parameters()).device

    @property
    def spec(self) -> EnvSpec:
        return self._spec

    @property
    def horizon(self) -> int:
        return 1

    @property
    def context_steps(self) -> int:
        return self._model.config.context_steps

    @property
    def remembers_episode(self) -> bool:
        """Whether more than the last K observations count, so that a server must hand the state on."""
        return True

    def initial_state(self, *, timestep: int = 0) -> MemoryState:
        """Nothing remembered; the step does not matter, since ages count from each write."""
        del timestep
        return _rows(self._model.initial_memory(1))[0]

    def act(
        self,
        observations: Sequence[Observation],
        states: Sequence[MemoryState],
        *,
        generator: np.random.Generator | None = None,
    ) -> tuple[list[Array], list[MemoryState]]:
        """B observations and states to B chunks (1, A) in raw units and B new states; deterministic.

        Raises:
            DataError: proprio of the wrong shape or not finite, or a camera is missing.
        """
        del generator
        if not observations:
            return [], []
        config = self._model.config
        task = None
        if config.goal_dim and self._goals is not None:
            nothing = self._model.encoder.goal_mean.cpu().numpy()
            words = [observation.instruction for observation in observations]
            task = self._tensor(goal_rows(words, self._goals, nothing))
        proprio = proprio_rows(observations, self._spec)
        frames = camera_frames(observations, self._spec, config.cameras or ())
        memory = EpisodicMemory(
            **{name: self._tensor(np.stack([getattr(s, name) for s in states])) for name in MemoryState.__slots__}
        )
        with torch.inference_mode():
            inputs = self._tensor(proprio) if config.state_dim else self._tensor(proprio[:, :0])
            views = {name: frame.to(self._device) for name, frame in frames.items()}
            features = self._model.encode_images(views)
            output, _, after = self._model(inputs, task, memory, image_features=features)
        actions = self._codec.decode(output.float().cpu().numpy())
        return list(actions[:, None]), _rows(after)

    def _tensor(self, array: Array) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


def _rows(memory: EpisodicMemory) -> list[MemoryState]:
    columns = {}
    for name in MemoryState.__slots__:
        tensor = getattr(memory, name)
        columns[name] = (tensor if tensor.dtype == torch.bool else tensor.float()).cpu().numpy()
        columns[name].flags.writeable = False
    return [MemoryState(**{name: column[row] for name, column in columns.items()}) for row in range(len(memory.valid))]
