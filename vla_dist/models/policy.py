"""A Decision Transformer as a pure policy: everything it remembers is in the state it hands back.

Shapes: B rows, K context steps, P proprio, A action, F image features.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Array, Observation
from vla_dist.models.actions import ActionCodec
from vla_dist.models.conditioning import ReturnConditioning
from vla_dist.models.decision_transformer import DecisionTransformer
from vla_dist.models.goals import GoalTable


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecisionTransformerState:
    """The last K steps of one robot's episode, newest last; the arrays are read-only."""

    proprio: Array
    """(K, P) float32, raw."""
    actions: Array
    """(K, A) float32, in [-1, 1] or one-hot; the newest one is what the policy returned until it is told otherwise."""
    returns_to_go: Array
    """(K,) float32, unscaled."""
    features: Array
    """(K, F) float32 image features; F is 0 without cameras."""
    num_steps: int
    """Rows from the end that are valid."""
    timestep: int
    """Index within the episode of the next observation."""


class DecisionTransformerPolicy:
    """Decides at a robot's rate; rows of a call may be at different steps, tasks and episodes.

    ``context_steps`` observations rebuild a state: with ``position='window'`` and no conditioning from
    ``initial_state()``; with a position or a target that counts steps from ``initial_state(timestep=t)``, where t is
    the index of the first observation replayed.
    """

    def __init__(
        self,
        model: DecisionTransformer,
        spec: EnvSpec,
        *,
        conditioning: ReturnConditioning,
        goals: GoalTable | None,
    ) -> None:
        """Args:
            goals: needed where the model has a goal_dim.

        Raises:
            ConfigError: the model's dimensions, head, cameras or language differ from what the spec needs.
        """
        _require_fit(model, spec, has_goals=goals is not None)
        self._model = model.eval()
        self._spec = spec
        self._conditioning = conditioning
        self._goals = goals
        self._codec = ActionCodec.of(spec)
        self._cameras = tuple(model.config.cameras or ())
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

    def initial_state(self, *, timestep: int = 0) -> DecisionTransformerState:
        """The state before an episode, or before its step ``timestep`` with nothing remembered."""
        steps = self.context_steps
        features = self._model.config.hidden_dim if self._cameras else 0
        return DecisionTransformerState(
            proprio=np.zeros((steps, self._spec.proprio_dim), np.float32),
            actions=np.zeros((steps, self._spec.action_dim), np.float32),
            returns_to_go=np.zeros(steps, np.float32),
            features=np.zeros((steps, features), np.float32),
            num_steps=0,
            timestep=timestep,
        )

    def act(
        self,
        observations: Sequence[Observation],
        states: Sequence[DecisionTransformerState],
        *,
        generator: np.random.Generator | None = None,
    ) -> tuple[list[Array], list[DecisionTransformerState]]:
        """B observations and states to B chunks (1, A) in raw units and B new states; deterministic.

        Raises:
            DataError: proprio or an executed action of the wrong shape or not finite, or a camera is missing.
        """
        if not observations:
            return [], []
        with torch.inference_mode():
            features = self._encode_images(observations)
            current = [
                self._observe(observation, state, feature)
                for observation, state, feature in zip(observations, states, features, strict=True)
            ]
            outputs = self._predict(observations, current)
        actions = self._codec.decode(outputs)
        own = self._codec.encode(actions)
        after = [
            replace(state, actions=_with_last(state.actions, action))
            for state, action in zip(current, own, strict=True)
        ]
        return list(actions[:, None]), after

    def _observe(
        self, observation: Observation, state: DecisionTransformerState, feature: Array
    ) -> DecisionTransformerState:
        """The state with this observation as its newest step, its action still unknown."""
        proprio = _checked("proprio", observation.proprio, self._spec.proprio_dim)
        actions = state.actions
        if not state.num_steps:
            value = self._conditioning.first(state.timestep, instruction=self._known_words(observation.instruction))
        else:
            value = self._conditioning.after(float(state.returns_to_go[-1]), observation.previous_reward)
            if observation.previous_action is not None:
                executed = _checked("previous_action", observation.previous_action, self._spec.action_dim)
                actions = _with_last(actions, self._codec.encode(executed))
        return DecisionTransformerState(
            proprio=_pushed(state.proprio, proprio),
            actions=_pushed(actions, np.zeros(self._spec.action_dim, np.float32)),
            returns_to_go=_pushed(state.returns_to_go, np.float32(value)),
            features=_pushed(state.features, feature),
            num_steps=min(state.num_steps + 1, self.context_steps),
            timestep=state.timestep + 1,
        )

    def _known_words(self, instruction: str) -> str:
        """The wording whose target holds for this instruction: itself, or the nearest one in meaning."""
        targets = self._conditioning.targets
        if instruction in targets or not targets or not instruction or self._goals is None:
            return instruction
        return self._goals.nearest(instruction, tuple(targets))

    def _lookup_goals(self, instructions: Sequence[str]) -> Array:
        """(B, G) float32. No words at all are the mean of all words, which the model's normaliser makes zero."""
        assert self._goals is not None
        words = [text for text in instructions if text]
        found = dict(zip(words, self._goals.lookup(words), strict=True)) if words else {}
        nothing = self._model.goal_mean.cpu().numpy()
        return np.stack([found[text] if text else nothing for text in instructions])

    def _predict(self, observations: Sequence[Observation], states: Sequence[DecisionTransformerState]) -> Array:
        """(B, A) outputs for the newest step of each row."""
        steps = self.context_steps
        column = np.arange(steps)
        num_steps = np.array([state.num_steps for state in states])
        newest = np.array([state.timestep - 1 for state in states])
        goals = None
        if self._goals is not None and self._model.config.goal_dim:
            goals = self._lookup_goals([observation.instruction for observation in observations])
        returns = np.stack([state.returns_to_go for state in states]) / np.float32(self._conditioning.scale)
        output = self._model(
            self._tensor(np.stack([state.proprio for state in states])),
            self._tensor(np.stack([state.actions for state in states])),
            self._tensor(returns),
            None if goals is None else self._tensor(goals),
            self._tensor(np.maximum(newest[:, None] - (steps - 1) + column, 0)),
            self._tensor(column >= steps - num_steps[:, None]),
            image_features=self._tensor(np.stack([state.features for state in states])) if self._cameras else None,
        )
        return output[:, -1].float().cpu().numpy()

    def _encode_images(self, observations: Sequence[Observation]) -> Array:
        """(B, F) features of the newest frames: past ones are kept in the state, so each is encoded once."""
        if not self._cameras:
            return np.zeros((len(observations), 0), np.float32)
        views = {}
        for camera in (c for c in self._spec.cameras if c.name in self._cameras):
            frames = [observation.images.get(camera.name) for observation in observations]
            shapes = {None if frame is None else frame.shape for frame in frames}
            if shapes != {(camera.height, camera.width, 3)}:
                raise DataError(
                    f"camera {camera.name!r} must give ({camera.height}, {camera.width}, 3) frames, got {shapes}"
                )
            stacked = np.stack([frame for frame in frames if frame is not None])
            views[camera.name] = self._tensor(stacked).permute(0, 3, 1, 2)[:, None]
        return self._model.encode_images(views)[:, 0].float().cpu().numpy()

    def _tensor(self, array: Array) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


def _require_fit(model: DecisionTransformer, spec: EnvSpec, *, has_goals: bool) -> None:
    config = model.config
    head = "discrete" if spec.action_kind == "discrete" else "tanh"
    names = {camera.name for camera in spec.cameras}
    wrong = []
    if config.state_dim != spec.proprio_dim:
        wrong.append(f"state_dim {config.state_dim} against proprio_dim {spec.proprio_dim}")
    if config.action_dim != spec.action_dim:
        wrong.append(f"action_dim {config.action_dim} against {spec.action_dim}")
    if config.head != head:
        wrong.append(f"head {config.head!r} against {spec.action_kind} actions, which need {head!r}")
    if not set(config.cameras or ()) <= names:
        wrong.append(f"cameras {config.cameras} against {sorted(names)}")
    if config.goal_dim and not has_goals:
        wrong.append(f"goal_dim {config.goal_dim} without a goal table")
    if wrong:
        raise ConfigError(f"the model does not fit spec {spec.name!r}: {'; '.join(wrong)}; build one from the spec")


def _checked(name: str, vector: Array, size: int) -> Array:
    if vector.shape != (size,) or not np.isfinite(vector).all():
        raise DataError(f"{name} must be ({size},) finite numbers, got shape {vector.shape}: {vector}")
    return vector.astype(np.float32, copy=False)


def _pushed(history: Array, newest: Array | np.float32) -> Array:
    """Drops the oldest row; a new read-only array, so that older states stay what they were."""
    moved = np.empty_like(history)
    moved[:-1] = history[1:]
    moved[-1] = newest
    moved.flags.writeable = False
    return moved


def _with_last(history: Array, newest: Array) -> Array:
    changed = history.copy()
    changed[-1] = newest
    changed.flags.writeable = False
    return changed
