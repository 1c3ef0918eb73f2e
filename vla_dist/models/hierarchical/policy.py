"""The hierarchical model as a pure policy: the subgoal and its age travel in the state.

Shapes: B rows, P proprio, A action, H chunk horizon.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from vla_dist.core.errors import ConfigError, NotFound
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Array, Observation
from vla_dist.models.actions import ActionCodec
from vla_dist.models.conditioning import ReturnConditioning
from vla_dist.models.goals import GoalTable
from vla_dist.models.hierarchical.hierarchical_vla import HierarchicalVLA
from vla_dist.models.hierarchical.recent import frozen, nothing_recent, recall
from vla_dist.models.observations import camera_frames, goal_rows, proprio_rows, require_fit

_OVER = math.log(0.1)
"""A skill that still lasts with less probability is over. At no single step need its end be likelier than not, so all
steps since it began count; and to go on a little costs less than to end too early."""

SubgoalSource = Literal["learned", "random", "oracle"]
Oracle = Callable[[Observation], Array | str]
"""What the planner should say: a skill's name, or the raw (P,) state to reach."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HierarchicalState:
    """One episode's subgoal and how long it has been held."""

    skill: int
    """Index of the vocabulary; -1: none yet, or the model has no skills."""
    target: Array
    """(P,) float32, the state to reach in normalised units; (0,) where the model has skills. Read-only."""
    age: int
    """Steps since the planner was asked; -1 before the first time."""
    lasting: float
    """Log probability that the skill has not ended since it began; 0.0 where no termination is learned."""
    clause: int
    """Of the sketch that is followed: which of its skills is due; 0 under a planner that looks."""
    words: int
    """CRC-32 of those that the sketch was read from; 0 before the first."""
    timestep: int
    """Index within the episode of the next observation."""
    recent_low: Array
    """(R, D) float32, what the controller perceived at the R < F steps before, newest last; (0, D) where it sees the
    moment alone. Read-only."""
    recent_high: Array
    """The same of the planner."""
    low_level: Any
    """The state of a controller that is another member; None of the built-in one."""


class HierarchicalPolicy:
    """Asks the planner at every multiple of k steps of the episode, and where the skill says that it is done; one that
    follows a sketch only there, and where the words change.

    K observations rebuild the state but for one thing: a planner with skills is told the skill before, or follows its
    sketch, and either goes back to the episode's beginning.
    """

    def __init__(
        self,
        model: HierarchicalVLA,
        spec: EnvSpec,
        *,
        conditioning: ReturnConditioning,
        goals: GoalTable | None,
        subgoals: SubgoalSource = "learned",
        oracle: Oracle | None = None,
    ) -> None:
        """Args:
            goals: needed where the planner has a goal_dim.
            subgoals: who names them: the planner, chance, or ``oracle``; the ablations that tell what a hierarchy's
                levels are worth.

        Raises:
            ConfigError: the model misses the spec, or an oracle is missing or idle.
        """
        config = model.config
        require_fit(config, spec, has_goals=goals is not None)
        if subgoals not in get_args(SubgoalSource) or (subgoals == "oracle") != (oracle is not None):
            raise ConfigError(
                f"subgoals {subgoals!r} must be one of {', '.join(get_args(SubgoalSource))}, and an oracle is given "
                "exactly where it is asked for"
            )
        self._model = model.eval()
        self._spec = spec
        self._goals = goals
        self._subgoals = subgoals
        self._oracle = oracle
        self._codec = ActionCodec.of(spec)
        self._device = next(model.parameters()).device
        self._skills = tuple(config.skills or ())
        self._follows = config.planner == "sketch" and subgoals == "learned"
        self._low_level: Any = None
        if config.controller is not None:
            self._low_level = _member_policy(model, spec, conditioning)

    @property
    def spec(self) -> EnvSpec:
        return self._spec

    @property
    def horizon(self) -> int:
        return self._model.config.horizon

    @property
    def context_steps(self) -> int:
        return self._model.config.context_steps

    @property
    def remembers_episode(self) -> bool:
        """Whether more than the last K observations count: the skill before goes back to the episode's beginning."""
        return bool(self._skills)

    def initial_state(self, *, timestep: int = 0) -> HierarchicalState:
        """Nothing planned; the first observation is."""
        return HierarchicalState(
            skill=-1,
            target=frozen(np.zeros(0 if self._skills else self._spec.proprio_dim, np.float32)),
            age=-1,
            lasting=0.0,
            clause=0,
            words=0,
            timestep=timestep,
            recent_low=nothing_recent(self._model.config.low_level_dim),
            recent_high=nothing_recent(self._model.config.high_level_dim),
            low_level=None if self._low_level is None else self._low_level.initial_state(timestep=timestep),
        )

    def act(
        self,
        observations: Sequence[Observation],
        states: Sequence[HierarchicalState],
        *,
        generator: np.random.Generator | None = None,
    ) -> tuple[list[Array], list[HierarchicalState]]:
        """B observations and states to B chunks (H, A) in raw units and B new states.

        Args:
            generator: draws random subgoals; None: they follow from the step of the episode.

        Raises:
            DataError: proprio of the wrong shape or not finite, or a camera is missing.
        """
        if not observations:
            return [], []
        proprio = proprio_rows(observations, self._spec)
        frames = camera_frames(observations, self._spec, self._model.config.cameras or ())
        with torch.inference_mode():
            reading = self._tensor(proprio if self._model.config.state_dim else proprio[:, :0])
            views = {name: frame.to(self._device) for name, frame in frames.items()}
            low, recent_low = self._perceive(reading, views, states)
            lasting = self._lasting(low, states)
            is_done = [value < _OVER for value in lasting]
            asked = [
                row
                for row, (observation, state) in enumerate(zip(observations, states, strict=True))
                if is_done[row] or self._is_due(observation, state)
            ]
            high, recent_high = self._overlook(observations, reading, views, states, asked)
            planned = [
                replace(state, recent_low=lately, recent_high=before, lasting=value)
                for state, lately, before, value in zip(states, recent_low, recent_high, lasting, strict=True)
            ]
            if asked:
                ended = [is_done[row] for row in asked]
                rows = [(observations[row], planned[row]) for row in asked]
                for row, state in zip(asked, self._plan(rows, reading[asked], high, ended, generator), strict=True):
                    planned[row] = state
            if low is None:
                return self._act_through_member(observations, planned, generator)
            output = self._model.controller(low, self._subgoal_vectors(planned, reading))
        actions = self._codec.decode(output.float().cpu().numpy())
        after = [replace(state, age=state.age + 1, timestep=state.timestep + 1) for state in planned]
        return list(actions[:, None]), after

    def _is_due(self, observation: Observation, state: HierarchicalState) -> bool:
        """Whether the planner is asked although the skill goes on."""
        if state.age < 0:
            return True
        if self._follows:
            return state.words != _crc(observation.instruction)
        return state.timestep % self._model.config.hold_steps == 0

    def _perceive(
        self, reading: torch.Tensor, views: dict[str, torch.Tensor], states: Sequence[HierarchicalState]
    ) -> tuple[torch.Tensor | None, list[Array]]:
        """(B, D) that the built-in controller acts on, and the ``recent_low`` of the states that follow."""
        recent = [state.recent_low for state in states]
        if self._low_level is not None:
            return None, recent
        return recall(self._model.controller, self._model.controller.perceive(reading, views), recent)

    def _overlook(
        self,
        observations: Sequence[Observation],
        reading: torch.Tensor,
        views: dict[str, torch.Tensor],
        states: Sequence[HierarchicalState],
        asked: Sequence[int],
    ) -> tuple[Any, list[Array]]:
        """What the planner decides on in the rows that ask it, and the ``recent_high`` of all states that come after.

        One with a context looks at every step, one without only where it is asked; one that reads gives sketches.
        """
        planner, recent = self._model.planner, [state.recent_high for state in states]
        if self._subgoals != "learned":
            return None, recent
        if planner.context_steps > 1:
            task = self._task(observations)
            high, recent = recall(planner, planner.perceive(reading, task, views), recent)
            return high[asked], recent
        if not asked:
            return None, recent
        task = self._task([observations[row] for row in asked])
        if self._follows:
            return planner.read(task), recent
        some = {name: view[asked] for name, view in views.items()}
        return planner.perceive(reading[asked], task, some), recent

    def _task(self, observations: Sequence[Observation]) -> torch.Tensor | None:
        """(B, G)."""
        if not self._model.config.goal_dim or self._goals is None:
            return None
        nothing = self._model.planner.encoder.goal_mean.cpu().numpy()
        return self._tensor(goal_rows([o.instruction for o in observations], self._goals, nothing))

    def _lasting(self, low: torch.Tensor | None, states: Sequence[HierarchicalState]) -> list[float]:
        """Of each row, with what its termination says now."""
        before = [state.lasting for state in states]
        if low is None or self._model.terminate is None:
            return before
        skills = torch.tensor([max(0, state.skill) for state in states], device=self._device)
        logits = self._model.stop_logits(low, self._model.embed_subgoal(skills))
        assert logits is not None
        went_on = logsigmoid(-logits).tolist()
        return [
            value + now if state.skill >= 0 else 0.0 for value, now, state in zip(before, went_on, states, strict=True)
        ]

    def _plan(
        self,
        rows: Sequence[tuple[Observation, HierarchicalState]],
        reading: torch.Tensor,
        high: Any,
        ended: Sequence[bool],
        generator: np.random.Generator | None,
    ) -> list[HierarchicalState]:
        """The states with a new subgoal, held for no step yet."""
        if self._follows:
            asked = zip(rows, high, ended, strict=True)
            return [_next_of(sketch, observation, state, over) for (observation, state), sketch, over in asked]
        if high is not None:
            plans = self._learned(high, reading, [state for _, state in rows], ended)
        elif self._subgoals == "oracle":
            assert self._oracle is not None
            plans = [self._read_oracle(self._oracle(observation)) for observation, _ in rows]
        else:
            plans = [self._draw(generator or np.random.default_rng(state.timestep)) for _, state in rows]
        if self._skills:
            named = zip(rows, map(int, plans), ended, strict=True)
            return [
                replace(s, skill=plan, age=0, lasting=s.lasting if plan == s.skill and not is_over else 0.0)
                for (_, s), plan, is_over in named
            ]
        return [
            replace(s, target=frozen(np.asarray(plan, np.float32)), age=0)
            for (_, s), plan in zip(rows, plans, strict=True)
        ]

    def _learned(
        self, high: torch.Tensor, reading: torch.Tensor, states: Sequence[HierarchicalState], ended: Sequence[bool]
    ) -> list[Any]:
        planner, before = self._model.planner, None
        if self._skills:
            none = len(self._skills)
            before = torch.tensor([s.skill if s.skill >= 0 else none for s in states], device=self._device)
        plan = planner(high, before)
        if not self._skills:
            return list((planner.encoder.normalised(reading) + plan).float().cpu().numpy())
        if len(self._skills) > 1:
            for row, (state, is_over) in enumerate(zip(states, ended, strict=True)):
                if is_over:  # what has just ended is not begun again
                    plan[row, state.skill] = -torch.inf
        return plan.argmax(-1).tolist()

    def _read_oracle(self, said: Array | str) -> Any:
        if not self._skills:
            return self._model.planner.encoder.normalised(self._tensor(np.asarray(said, np.float32))).cpu().numpy()
        if said not in self._skills:
            raise NotFound(f"the oracle named {said!r}; the skills are {', '.join(self._skills)}")
        return self._skills.index(str(said))

    def _draw(self, generator: np.random.Generator) -> Any:
        """Any skill, or any state within the data's spread."""
        if self._skills:
            return int(generator.integers(len(self._skills)))
        return generator.normal(size=self._spec.proprio_dim).astype(np.float32)

    def _subgoal_vectors(self, states: Sequence[HierarchicalState], reading: torch.Tensor) -> torch.Tensor:
        """(B, Z). A state to reach is told as what is left of the way."""
        if self._skills:
            return self._model.embed_subgoal(torch.tensor([s.skill for s in states], device=self._device))
        targets = self._tensor(np.stack([state.target for state in states]))
        return self._model.embed_subgoal(targets - self._model.controller.encoder.normalised(reading))

    def _act_through_member(
        self,
        observations: Sequence[Observation],
        states: Sequence[HierarchicalState],
        generator: np.random.Generator | None,
    ) -> tuple[list[Array], list[HierarchicalState]]:
        told = [replace(o, instruction=self._skills[s.skill]) for o, s in zip(observations, states, strict=True)]
        chunks, low = self._low_level.act(told, [state.low_level for state in states], generator=generator)
        after = [
            replace(state, age=state.age + 1, timestep=state.timestep + 1, low_level=inner)
            for state, inner in zip(states, low, strict=True)
        ]
        return chunks, after

    def _tensor(self, array: Array) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


def _next_of(
    sketch: Sequence[int], observation: Observation, state: HierarchicalState, is_over: bool
) -> HierarchicalState:
    """With the skill that is due: the first of new words, else the next where one is over, if there is a next."""
    words = _crc(observation.instruction)
    is_new = state.age < 0 or state.words != words
    clause = 0 if is_new else min(state.clause + is_over, len(sketch) - 1)
    return replace(state, skill=sketch[clause], clause=clause, words=words, age=0, lasting=0.0)


def _crc(words: str) -> int:
    return zlib.crc32(words.encode())


def _member_policy(model: HierarchicalVLA, spec: EnvSpec, conditioning: ReturnConditioning) -> Any:
    """The controller's own policy, whose words are the skills and whose goals are their vectors."""
    from vla_dist.models.zoo import architecture_of

    assert model.embed_skill is not None
    vectors = model.embed_skill.weight.detach().float().cpu().numpy()
    goals = GoalTable(_refuse, instructions=model.config.skills or (), embeddings=vectors)
    return architecture_of(model.controller).policy(model.controller, spec, conditioning=conditioning, goals=goals)


def _refuse(texts: Sequence[str]) -> Array:
    raise NotFound(f"{list(texts)} are no skills of this hierarchy; its planner names only known ones")
