"""A Decision Transformer as a pure policy: everything it remembers is in the state it hands back.

Shapes: B rows, K context steps, P proprio, A action, F image features, O outputs of the head.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Array, Observation
from vla_dist.models.actions import ActionCodec
from vla_dist.models.conditioning import ReturnConditioning
from vla_dist.models.decision_transformer.attention_cache import (
    AttentionCache,
    gather_buffers,
    scatter_newest,
    split_window,
)
from vla_dist.models.decision_transformer.decision_transformer import DecisionTransformer
from vla_dist.models.decision_transformer.reader import WindowReader
from vla_dist.models.goals import GoalTable
from vla_dist.models.observations import camera_frames, finite_vector, goal_rows, pushed, require_fit

_makers = itertools.count()


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
    cache: AttentionCache | None = None
    """What the model computed for these steps; None where the next act computes them anew: nothing is ever lost."""


class _Window(NamedTuple):
    """What a policy decides from: a state with the new observation as its last step."""

    proprio: Array
    actions: Array
    """(K, A), the last one not decided yet; nobody else holds this array."""
    returns_to_go: Array
    features: Array
    num_steps: int
    timestep: int
    """Of the last step."""
    cache: AttentionCache | None
    """Of the steps before it."""
    will_grow: bool
    """Whether the step that follows will still be added to these."""


class DecisionTransformerPolicy:
    """Decides at a robot's rate; rows of a call may be at different steps, tasks and episodes.

    ``context_steps`` observations rebuild a state: with ``position='window'`` and no conditioning from
    ``initial_state()``; with a position or a target that counts steps from ``initial_state(timestep=t)``, where t is
    the index of the first observation replayed.

    While the window only grows, an act adds one step to a cache of keys and values; when it moves on, or the
    instruction changes, or another policy object made the cache, the window is computed whole. Both give the same
    actions but for rounding. The weights of a model must not change while a policy acts with it.
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
        require_fit(model.config, spec, has_goals=goals is not None)
        self._model = model.eval()
        self._reader = WindowReader(model)
        self._spec = spec
        self._conditioning = conditioning
        self._goals = goals
        self._codec = ActionCodec.of(spec)
        self._cameras = tuple(model.config.cameras or ())
        self._device = next(model.parameters()).device
        self._maker = next(_makers)
        # Read for every robot at every act: attributes of a config cost more than plain ones.
        config = model.config
        self._steps = config.context_steps
        self._hops = config.window == "hop"
        self._tokens_per_step = model.tokens_per_step
        self._has_action_tokens, self._has_return_tokens = config.use_previous_actions, config.use_returns
        self._draws = config.head == "gaussian"
        self._goal_dim = config.goal_dim
        self._num_prefix = config.num_goal_tokens if config.goal_dim and config.goal_fusion == "prefix" else 0
        self._last_row = model.embed_position.num_embeddings - 1
        self._numbers_steps = config.position == "window"

    @property
    def spec(self) -> EnvSpec:
        return self._spec

    @property
    def horizon(self) -> int:
        return 1

    @property
    def context_steps(self) -> int:
        return self._steps

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
        """B observations and states to B chunks (1, A) in raw units and B new states.

        Args:
            generator: draws the actions of a model with a ``gaussian`` head; None, and every other head: the likeliest.

        Raises:
            DataError: proprio or an executed action of the wrong shape or not finite, or a camera is missing.
        """
        if not observations:
            return [], []
        with torch.inference_mode():
            features = self._encode_images(observations)
            windows = [self._observe(o, s, f) for o, s, f in zip(observations, states, features, strict=True)]
            outputs, caches = self._predict(observations, windows)
            noise = None
            if generator is not None and self._draws:
                noise = self._tensor(generator.standard_normal((len(windows), self._spec.action_dim), np.float32))
            predicted = self._model.actions_from(outputs, noise).float().cpu().numpy()
        actions = self._codec.decode(predicted)
        own = self._codec.encode(actions)
        after = [self._decided(w, action, cache) for w, action, cache in zip(windows, own, caches, strict=True)]
        return list(actions[:, None]), after

    def _observe(self, observation: Observation, state: DecisionTransformerState, feature: Array) -> _Window:
        proprio = finite_vector("proprio", observation.proprio, self._spec.proprio_dim)
        actions = np.empty_like(state.actions)
        actions[:-1], actions[-1] = state.actions[1:], 0.0
        if not state.num_steps:
            value = self._conditioning.first(state.timestep, instruction=self._known_words(observation.instruction))
        else:
            value = self._conditioning.after(float(state.returns_to_go[-1]), observation.previous_reward)
            if observation.previous_action is not None:
                executed = finite_vector("previous_action", observation.previous_action, self._spec.action_dim)
                actions[-2:-1] = self._codec.encode(executed)
        num_steps = self._num_remembered(state.num_steps, state.timestep)
        return _Window(
            proprio=pushed(state.proprio, proprio),
            actions=actions,
            returns_to_go=pushed(state.returns_to_go, np.float32(value)),
            features=pushed(state.features, feature),
            num_steps=num_steps,
            timestep=state.timestep,
            cache=state.cache,
            will_grow=self._num_remembered(num_steps, state.timestep + 1) == num_steps + 1,
        )

    def _decided(self, window: _Window, action: Array, cache: AttentionCache | None) -> DecisionTransformerState:
        window.actions[-1] = action
        window.actions.flags.writeable = False
        return DecisionTransformerState(
            proprio=window.proprio,
            actions=window.actions,
            returns_to_go=window.returns_to_go,
            features=window.features,
            num_steps=window.num_steps,
            timestep=window.timestep + 1,
            cache=cache,
        )

    def _num_remembered(self, num_steps: int, timestep: int) -> int:
        """Valid steps of a state once the step ``timestep`` has joined the ``num_steps`` before it.

        With ``hop`` the oldest step is a multiple of K / 2 counted from the start of the episode, so that a state
        rebuilt from its last K observations has the same one.
        """
        steps = self._steps
        if not self._hops:
            return min(num_steps + 1, steps)
        half = max(1, steps // 2)
        oldest = half * max(0, -((steps - 1 - timestep) // half))
        return min(num_steps + 1, timestep - oldest + 1)

    def _known_words(self, instruction: str) -> str:
        """The wording whose target holds for this instruction: itself, or the nearest one in meaning."""
        targets = self._conditioning.targets
        if instruction in targets or not targets or not instruction or self._goals is None:
            return instruction
        return self._goals.nearest(instruction, tuple(targets))

    def _lookup_goals(self, instructions: Sequence[str]) -> Array:
        """(B, G) float32. No words at all are the mean of all words, which the model's normaliser makes zero."""
        assert self._goals is not None
        return goal_rows(instructions, self._goals, self._model.goal_mean.cpu().numpy())

    def _predict(
        self, observations: Sequence[Observation], windows: Sequence[_Window]
    ) -> tuple[torch.Tensor, list[AttentionCache | None]]:
        """(B, O) outputs for the newest step of each row, and what each row's next act may add to."""
        goals = np.zeros((len(windows), 0), np.float32)
        if self._goals is not None and self._goal_dim:
            goals = self._lookup_goals([observation.instruction for observation in observations])
        growing = [row for row, window in enumerate(windows) if self._may_extend(window, goals[row])]
        if len(growing) == len(windows):
            return self._extend(windows, goals)
        if not growing:
            return self._compute(windows, goals)
        others = sorted(set(range(len(windows))) - set(growing))
        outputs = torch.empty(len(windows), self._model.config.num_outputs, device=self._device)
        caches: dict[int, AttentionCache | None] = {}
        for rows, compute in ((growing, self._extend), (others, self._compute)):
            outputs[rows], made = compute([windows[row] for row in rows], goals[rows])
            caches.update(zip(rows, made, strict=True))
        return outputs, [caches[row] for row in range(len(windows))]

    def _may_extend(self, window: _Window, goal: Array) -> bool:
        cache = window.cache
        return (
            cache is not None
            and cache.maker == self._maker
            and cache.length == self._num_tokens(window.num_steps - 1)
            and np.array_equal(cache.goal, goal)
        )

    def _num_tokens(self, num_steps: int) -> int:
        """Of the goal and of this many steps up to the last state token."""
        return self._num_prefix + num_steps * self._tokens_per_step - self._has_action_tokens

    def _compute(self, windows: Sequence[_Window], goals: Array) -> tuple[torch.Tensor, list[AttentionCache | None]]:
        """All windows whole."""
        num_steps = np.array([window.num_steps for window in windows])
        newest = np.array([window.timestep for window in windows])
        # Steps that no row remembers are not computed.
        kept = slice(-int(num_steps.max()), None)
        column = np.arange(-num_steps.max(), 0)
        outputs, cache = self._reader.whole(
            self._tensor(np.stack([window.proprio[kept] for window in windows])),
            self._tensor(np.stack([window.actions[kept] for window in windows])),
            self._tensor(np.stack([w.returns_to_go[kept] for w in windows]) / np.float32(self._conditioning.scale)),
            self._goal_tensor(goals),
            self._tensor(np.maximum(newest[:, None] + 1 + column, 0)),
            self._tensor(column >= -num_steps[:, None]),
            image_features=self._tensor(np.stack([w.features[kept] for w in windows])) if self._cameras else None,
        )
        growing = [row for row, window in enumerate(windows) if window.will_grow]
        made: list[AttentionCache | None] = [None] * len(windows)
        if growing:
            lengths = [self._num_tokens(int(num_steps[row])) for row in growing]
            room = {"num_prefix": self._num_prefix, "capacity": self._reader.capacity}
            buffers = split_window(cache[:, :, growing], lengths, **room)
            for row, buffer, length in zip(growing, buffers, lengths, strict=True):
                made[row] = AttentionCache.of(buffer, length, goal=_own(goals[row]), maker=self._maker)
        return outputs, made

    def _extend(self, windows: Sequence[_Window], goals: Array) -> tuple[torch.Tensor, list[AttentionCache | None]]:
        """All windows by their newest step, to which their caches reach."""
        size, past = self._tokens_per_step, [window.cache for window in windows if window.cache is not None]
        lengths, buffers = [cache.length for cache in past], [cache.room(size) for cache in past]
        is_alone = len(past) == 1 and self._device.type == "cpu"
        if is_alone:
            together, is_key = buffers[0].tensor[:, :, None, : lengths[0] + size], None
        else:
            together, is_key = gather_buffers(buffers, lengths, room=size)
            together, is_key = together.to(self._device), is_key.to(self._device)
        outputs = self._reader.extend(
            together,
            is_key,
            numbers=self._tensor(self._numbers(windows)),
            positions=self._tensor(self._positions(windows)),
            goals=self._goal_tensor(goals),
            image_features=self._tensor(np.stack([w.features[-1] for w in windows])) if self._cameras else None,
        )
        if not is_alone:
            scatter_newest(together, buffers, lengths, num=size)
        made = [
            AttentionCache.of(buffer, length + size, goal=cache.goal, maker=self._maker) if window.will_grow else None
            for window, cache, buffer, length in zip(windows, past, buffers, lengths, strict=True)
        ]
        return outputs, made

    def _numbers(self, windows: Sequence[_Window]) -> Array:
        """(B, I) what ``WindowReader.extend`` reads of the newest steps."""
        rows = []
        for window in windows:
            row = [window.proprio[-1]]
            if self._has_return_tokens:
                row.insert(0, window.returns_to_go[-1:] / np.float32(self._conditioning.scale))
            if self._has_action_tokens:
                row.insert(0, window.actions[-2])
            rows.append(np.concatenate(row))
        return np.stack(rows)

    def _positions(self, windows: Sequence[_Window]) -> Array:
        """(B, S) rows of the position table: the action belongs to the step before."""
        later = np.array([w.num_steps - 1 if self._numbers_steps else w.timestep for w in windows])
        rows = np.repeat(later[:, None], self._tokens_per_step, 1)
        rows[:, 0] -= self._has_action_tokens
        return rows.clip(0, self._last_row)

    def _goal_tensor(self, goals: Array) -> torch.Tensor | None:
        return self._tensor(goals) if self._goal_dim else None

    def _encode_images(self, observations: Sequence[Observation]) -> Array:
        """(B, F) features of the newest frames: past ones are kept in the state, so each is encoded once."""
        if not self._cameras:
            return np.zeros((len(observations), 0), np.float32)
        frames = camera_frames(observations, self._spec, self._cameras)
        views = {name: images[:, None].to(self._device) for name, images in frames.items()}
        features = self._model.encode_images(views)
        assert features is not None
        return features[:, 0].float().cpu().numpy()

    def _tensor(self, array: Array) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


def _own(goal: Array) -> Array:
    kept = goal.copy()
    kept.flags.writeable = False
    return kept
