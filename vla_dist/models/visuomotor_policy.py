"""RT-1, BC-Z and the composed policies as pure policies: everything they remember is in the state they hand back.

Shapes: B rows, K context steps, P proprio, A action, H horizon, F... one step's image features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Array, Observation
from vla_dist.models.actions import ActionCodec
from vla_dist.models.conditioning import ReturnConditioning
from vla_dist.models.goals import GoalTable
from vla_dist.models.observations import camera_frames, goal_rows, proprio_rows, pushed, require_fit
from vla_dist.models.visuomotor import VisuomotorModel, Words


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VisuomotorState:
    """The last K steps of one robot's episode, newest last; the arrays are read-only."""

    proprio: Array
    """(K, P) float32, raw; P is 0 where the model does not look at it."""
    features: Array
    """(K, F...) float32 image features. Each frame was encoded once, in the words that it came with."""
    num_steps: int
    """Rows from the end that are valid."""
    timestep: int
    """Index within the episode of the next observation."""


class VisuomotorPolicy:
    """Decides at a robot's rate; rows of a call may be at different steps, tasks and episodes.

    ``context_steps`` observations rebuild a state from ``initial_state``, whatever came before them.
    """

    def __init__(
        self,
        model: VisuomotorModel,
        spec: EnvSpec,
        *,
        conditioning: ReturnConditioning,
        goals: GoalTable | None,
    ) -> None:
        """Args:
            conditioning: not used: these models imitate, whatever the return.
            goals: needed where the model has a goal_dim.

        Raises:
            ConfigError: the model's dimensions, head, cameras or language differ from what the spec needs.
        """
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
        return self._model.config.horizon

    @property
    def context_steps(self) -> int:
        return self._model.config.context_steps

    def initial_state(self, *, timestep: int = 0) -> VisuomotorState:
        """The state before an episode, or before its step ``timestep`` with nothing remembered."""
        steps = self.context_steps
        return VisuomotorState(
            proprio=_read_only(np.zeros((steps, self._model.config.state_dim), np.float32)),
            features=_read_only(np.zeros((steps, *self._model.feature_shape), np.float32)),
            num_steps=0,
            timestep=timestep,
        )

    def act(
        self,
        observations: Sequence[Observation],
        states: Sequence[VisuomotorState],
        *,
        generator: np.random.Generator | None = None,
    ) -> tuple[list[Array], list[VisuomotorState]]:
        """B observations and states to B chunks (H, A) in raw units and B new states.

        Args:
            generator: draws from the head's distribution where it has one; None: deterministic.

        Raises:
            DataError: proprio of the wrong shape or not finite, or a camera is missing.
        """
        if not observations:
            return [], []
        readings = proprio_rows(observations, self._spec)
        cameras = self._model.config.cameras or []
        views = camera_frames(observations, self._spec, cameras)
        with torch.inference_mode():
            words = self._understand(observations)
            frames = {name: view[:, None].to(self._device) for name, view in views.items()}
            encoded = self._model.features_of(frames, words, (len(observations), 1))
            features = encoded[:, 0].float().cpu().numpy()
            after = [
                self._observed(state, reading, feature)
                for state, reading, feature in zip(states, readings, features, strict=True)
            ]
            outputs = self._decide(after, words, generator)
        return list(self._codec.decode(outputs)), after

    def _understand(self, observations: Sequence[Observation]) -> Words | None:
        texts = [observation.instruction for observation in observations]
        if self._goals is None or not self._model.config.goal_dim:
            return self._model.understand(texts, len(texts))
        vectors = goal_rows(texts, self._goals, self._model.goal_mean.cpu().numpy())
        return self._model.understand(torch.from_numpy(vectors).to(self._device), len(texts))

    def _observed(self, state: VisuomotorState, reading: Array, feature: Array) -> VisuomotorState:
        return VisuomotorState(
            proprio=pushed(state.proprio, reading[: self._model.config.state_dim]),
            features=pushed(state.features, feature),
            num_steps=min(state.num_steps + 1, self.context_steps),
            timestep=state.timestep + 1,
        )

    def _decide(
        self, states: Sequence[VisuomotorState], words: Words | None, generator: np.random.Generator | None
    ) -> Array:
        """(B, H, A) model outputs."""
        steps = self.context_steps
        num_steps = np.array([state.num_steps for state in states])
        output = self._model.decide(
            self._tensor(np.stack([state.proprio for state in states])),
            self._tensor(np.stack([state.features for state in states])),
            words,
            self._tensor(np.arange(steps) >= steps - num_steps[:, None]),
            generator,
        )
        return output.float().cpu().numpy()

    def _tensor(self, array: Array) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


def _read_only(array: Array) -> np.ndarray[Any, np.dtype[Any]]:
    array.flags.writeable = False
    return array
