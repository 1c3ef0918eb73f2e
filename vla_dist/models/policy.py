"""A Decision Transformer as a pure policy: everything it remembers is in the state it hands back.

Shapes: B rows, K context steps, P proprio, A action, F image features, O outputs of the head.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from vla_dist.core.errors import DataError
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Array, Observation
from vla_dist.models.actions import ActionCodec
from vla_dist.models.attention_cache import AttentionCache, gather_caches, split_cache
from vla_dist.models.conditioning import ReturnConditioning
from vla_dist.models.decision_transformer import DecisionTransformer
from vla_dist.models.goals import GoalTable
from vla_dist.models.observations import camera_frames, goal_rows, pushed, require_fit

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
        self._has_action_tokens = config.use_previous_actions
        self._goal_dim = config.goal_dim
        self._num_prefix = config.num_goal_tokens if config.goal_dim and config.goal_fusion == "prefix" else 0

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
            current = [
                self._observe(observation, state, feature)
                for observation, state, feature in zip(observations, states, features, strict=True)
            ]
            outputs, caches = self._predict(observations, current)
            noise = None
            if generator is not None and self._model.config.head == "gaussian":
                noise = self._tensor(generator.standard_normal((len(current), self._spec.action_dim), np.float32))
            predicted = self._model.actions_from(outputs, noise).float().cpu().numpy()
        actions = self._codec.decode(predicted)
        own = self._codec.encode(actions)
        after = [
            replace(state, actions=_with_last(state.actions, action), cache=cache)
            for state, action, cache in zip(current, own, caches, strict=True)
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
            proprio=pushed(state.proprio, proprio),
            actions=pushed(actions, np.zeros(self._spec.action_dim, np.float32)),
            returns_to_go=pushed(state.returns_to_go, np.float32(value)),
            features=pushed(state.features, feature),
            num_steps=self._num_remembered(state),
            timestep=state.timestep + 1,
            cache=state.cache,
        )

    def _num_remembered(self, before: DecisionTransformerState) -> int:
        """Valid steps of the state that follows.

        With ``hop`` the oldest step is a multiple of K / 2 counted from the start of the episode, so that a state
        rebuilt from its last K observations has the same one.
        """
        steps = self._steps
        if not self._hops:
            return min(before.num_steps + 1, steps)
        half = max(1, steps // 2)
        oldest = half * max(0, -((steps - 1 - before.timestep) // half))
        return min(before.num_steps + 1, before.timestep - oldest + 1)

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
        self, observations: Sequence[Observation], states: Sequence[DecisionTransformerState]
    ) -> tuple[torch.Tensor, list[AttentionCache | None]]:
        """(B, O) outputs for the newest step of each row, and what each row's next act may add to."""
        goals = np.zeros((len(states), 0), np.float32)
        if self._goals is not None and self._goal_dim:
            goals = self._lookup_goals([observation.instruction for observation in observations])
        growing = [row for row, state in enumerate(states) if self._may_extend(state, goals[row])]
        others = sorted(set(range(len(states))) - set(growing))
        outputs = torch.empty(len(states), self._model.config.num_outputs, device=self._device)
        caches: dict[int, AttentionCache | None] = {}
        for rows, compute in ((growing, self._extend), (others, self._compute)):
            if rows:
                outputs[rows], made = compute([states[row] for row in rows], goals[rows])
                caches.update(zip(rows, made, strict=True))
        return outputs, [caches[row] for row in range(len(states))]

    def _may_extend(self, state: DecisionTransformerState, goal: Array) -> bool:
        cache = state.cache
        return (
            cache is not None
            and cache.maker == self._maker
            and cache.keys_values.shape[2] == self._num_tokens(state.num_steps - 1)
            and np.array_equal(cache.goal, goal)
        )

    def _num_tokens(self, num_steps: int) -> int:
        """Of the goal and of this many steps up to the last state token."""
        return self._num_prefix + num_steps * self._tokens_per_step - self._has_action_tokens

    def _compute(
        self, states: Sequence[DecisionTransformerState], goals: Array
    ) -> tuple[torch.Tensor, list[AttentionCache | None]]:
        num_steps = np.array([state.num_steps for state in states])
        newest = np.array([state.timestep - 1 for state in states])
        # Steps that no row remembers are not computed.
        kept = slice(-int(num_steps.max()), None)
        column = np.arange(-num_steps.max(), 0)
        outputs, cache = self._model.newest(
            self._tensor(np.stack([state.proprio[kept] for state in states])),
            self._tensor(np.stack([state.actions[kept] for state in states])),
            self._returns(np.stack([state.returns_to_go[kept] for state in states])),
            self._goal_tensor(goals),
            self._tensor(np.maximum(newest[:, None] + 1 + column, 0)),
            self._tensor(column >= -num_steps[:, None]),
            image_features=self._tensor(np.stack([s.features[kept] for s in states])) if self._cameras else None,
        )
        growing = [row for row, state in enumerate(states) if self._num_remembered(state) == state.num_steps + 1]
        made: list[AttentionCache | None] = [None] * len(states)
        if growing:
            lengths = [self._num_tokens(int(num_steps[row])) for row in growing]
            own = split_cache(
                cache[:, :, growing],
                lengths,
                [goals[row] for row in growing],
                num_prefix=self._num_prefix,
                maker=self._maker,
            )
            for row, one in zip(growing, own, strict=True):
                made[row] = one
        return outputs, made

    def _extend(
        self, states: Sequence[DecisionTransformerState], goals: Array
    ) -> tuple[torch.Tensor, list[AttentionCache | None]]:
        size = self._tokens_per_step
        past = [state.cache for state in states if state.cache is not None]
        cache, is_key = gather_caches(past, room=size, device=self._device)
        outputs = self._model.extend(
            cache,
            is_key,
            state=self._tensor(np.stack([state.proprio[-1] for state in states])),
            previous_action=self._tensor(np.stack([state.actions[-2] for state in states])),
            return_to_go=self._returns(np.stack([state.returns_to_go[-1] for state in states])),
            goals=self._goal_tensor(goals),
            timestep=self._tensor(np.array([state.timestep - 1 for state in states])),
            num_before=self._tensor(np.array([state.num_steps - 1 for state in states])),
            image_features=self._tensor(np.stack([s.features[-1] for s in states])) if self._cameras else None,
        )
        lengths = [one.keys_values.shape[2] + size for one in past]
        own = split_cache(cache, lengths, [one.goal for one in past], num_prefix=0, maker=self._maker)
        kept = [one if self._num_remembered(s) == s.num_steps + 1 else None for one, s in zip(own, states, strict=True)]
        return outputs, kept

    def _goal_tensor(self, goals: Array) -> torch.Tensor | None:
        return self._tensor(goals) if self._goal_dim else None

    def _returns(self, values: Array) -> torch.Tensor:
        return self._tensor(values / np.float32(self._conditioning.scale))

    def _encode_images(self, observations: Sequence[Observation]) -> Array:
        """(B, F) features of the newest frames: past ones are kept in the state, so each is encoded once."""
        if not self._cameras:
            return np.zeros((len(observations), 0), np.float32)
        frames = camera_frames(observations, self._spec, self._cameras)
        views = {name: images[:, None].to(self._device) for name, images in frames.items()}
        return self._model.encode_images(views)[:, 0].float().cpu().numpy()

    def _tensor(self, array: Array) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


def _checked(name: str, vector: Array, size: int) -> Array:
    if vector.shape != (size,) or not np.isfinite(vector).all():
        raise DataError(f"{name} must be ({size},) finite numbers, got shape {vector.shape}: {vector}")
    return vector.astype(np.float32, copy=False)


def _with_last(history: Array, newest: Array) -> Array:
    changed = history.copy()
    changed[-1] = newest
    changed.flags.writeable = False
    return changed
