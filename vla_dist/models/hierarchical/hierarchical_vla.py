"""HierarchicalVLA: a planner that now and then names a subgoal, and a controller that pursues it at every step.

Shapes: B batch, K steps, P proprio, G goal, A action, H chunk horizon, S skills, N skills of a sketch, Z subgoal width.
"""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModel
from transformers import initialization as init

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.models.batch import TrainBatch
from vla_dist.models.film import FiLM
from vla_dist.models.hierarchical.alignment import Sketches, Surroundings, log_likelihood, posterior
from vla_dist.models.hierarchical.config import HierarchicalVLAConfig
from vla_dist.models.hierarchical.levels import Controller, Planner, Termination
from vla_dist.models.hierarchical.sketch_planner import SketchPlanner
from vla_dist.models.member import masked_mean, require_batch, setting_types
from vla_dist.models.pretrained import WholePreTrainedModel
from vla_dist.models.settings import build_config, require_settings

_ACTION_STD = 0.2
"""Of the Gaussian by which a skill explains a recorded action in [-1, 1]."""


class HierarchicalVLA(WholePreTrainedModel):
    """Two levels that share no parameter and no gradient: the controller is handed subgoals as plain numbers.

    A subgoal is one of S named skills, or, without names, the state that shall be reached at the end of the hold, as a
    displacement in normalised units.

    Source: options held until they terminate, Sutton et al. 1999; levels trained apart on relabelled data, Gupta et al.
    2019, "Relay Policy Learning", section 4.
    """

    config_class = HierarchicalVLAConfig
    config: HierarchicalVLAConfig
    base_model_prefix = "hierarchical_vla"
    main_input_name = "low_level_state"

    def __init__(
        self,
        high_level_dim: int | HierarchicalVLAConfig,
        low_level_dim: int | None = None,
        action_dim: int | None = None,
        **settings: Any,
    ) -> None:
        """Build from dimensions, or from a config given in the first place.

        Args:
            high_level_dim: width of what the planner reads.
            low_level_dim: width of what the controller reads.
            settings: any further field of HierarchicalVLAConfig; ``state_dim`` is ``low_level_dim`` unless given.
        """
        if isinstance(high_level_dim, HierarchicalVLAConfig):
            config = high_level_dim
        else:
            if low_level_dim is None or action_dim is None:
                raise ConfigError("HierarchicalVLA needs high_level_dim, low_level_dim and action_dim, or one config")
            sizes = {"high_level_dim": high_level_dim, "low_level_dim": low_level_dim, "action_dim": action_dim}
            config = build_config(HierarchicalVLAConfig, {"state_dim": low_level_dim, **settings}, **sizes)
        super().__init__(config)
        self.planner: Any = SketchPlanner(config) if config.planner == "sketch" else Planner(config)
        self.controller: Any = Controller(config) if config.controller is None else _build_member(config)
        self.embed_skill = nn.Embedding(len(config.skills or ()), config.subgoal_dim) if config.skills else None
        self.embed_displacement = None if config.skills else nn.Linear(config.state_dim, config.subgoal_dim)
        self.terminate = Termination(config) if config.learned_termination else None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, FiLM):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
            # At first a skill goes on for some ten steps.
            stops = self.terminate is not None and module is self.terminate.head
            init.constant_(module.bias, -2.0 if stops else 0.0)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=1.0)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    def set_normaliser(
        self,
        *,
        proprio_mean: Tensor,
        proprio_std: Tensor,
        goal_mean: Tensor | None = None,
        goal_std: Tensor | None = None,
    ) -> None:
        """Fill the buffers of both levels. Raises DataError where a shape differs or a number is not finite."""
        scales = {"proprio_mean": proprio_mean, "proprio_std": proprio_std}
        self.planner.encoder.set_normaliser(**scales, goal_mean=goal_mean, goal_std=goal_std)
        controller = self.controller.encoder if self.config.controller is None else self.controller
        controller.set_normaliser(**scales)

    def forward(
        self, high_level_state: Tensor, low_level_state: Tensor, *, previous_skill: Tensor | None = None
    ) -> Tensor:
        """Plan and act once.

        Args:
            high_level_state: (B, high_level_dim), for example from ``planner.perceive`` or, of a planner with a
                context, from ``planner.recall``.
            low_level_state: (B, low_level_dim), the same of the controller.
            previous_skill: (B,) int64, the skill that ran before; None: none.

        Returns:
            (B, A) action in [-1, 1], or logits where the head is ``discrete``.

        Raises:
            ConfigError: the controller is another member of the zoo, which reads more than a vector, or the planner
                follows a sketch, which is in no state; use the policy.
        """
        if self.config.controller is not None or self.config.planner == "sketch":
            raise ConfigError(
                "forward acts with the built-in controller under a reactive planner; use this model's policy"
            )
        plan = self.planner(high_level_state, previous_skill).detach()
        subgoal = self.embed_subgoal(plan.argmax(-1) if self.config.skills else plan)
        return self.controller(low_level_state, subgoal)

    def embed_subgoal(self, subgoal: Tensor) -> Tensor:
        """(...) int64 skills, or (..., P) normalised displacements, to the (..., Z) that the controller reads."""
        if self.embed_skill is not None:
            return self.embed_skill(subgoal)
        assert self.embed_displacement is not None
        return self.embed_displacement(subgoal)

    def stop_logits(self, low_level_state: Tensor, subgoal: Tensor) -> Tensor | None:
        """(..., low_level_dim) and (..., Z) to (...) that the subgoal is done; None where only the clock decides."""
        return None if self.terminate is None else self.terminate(low_level_state, subgoal)

    def loss(self, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """What both levels learn from windows of a replay, which stores no subgoals.

        * With skills: a window's ``tasks`` or ``instructions`` name one skill or several in order. One labels all
          steps. Of several, the changes are latent: the controller and its termination maximise the likelihood of the
          actions over all alignments, and the planner learns the skills that are most probably running.
        * With a planner that follows a sketch: as above, and it learns which clause of the words names which skill,
          from windows whose words have as many clauses as there are skills.
        * Without: the state at the end of each hold within the window is the subgoal of the steps before it. The newest
          step, whose future is not in the window, teaches nothing.
        * A controller that is another member learns with each window's skill as its goal and its words; windows of
          several skills are left out, since only the built-in one can say how well each skill explains an action.

        The sums of both levels' terms are divided by one count, ``loss_count``, so that the levels keep their shares
        however a batch is cut.

        Raises:
            DataError: the batch is of another robot or model, or a window names no known skill.
        """
        require_batch(batch, self.config)
        if self.config.controller is not None:
            loss, metrics = self._member_loss(batch)
        elif self.config.skills:
            loss, metrics = self._skill_loss(batch)
        else:
            loss, metrics = self._latent_loss(batch)
        return loss, {"loss": loss.detach(), **{name: value.detach() for name, value in metrics.items()}}

    def loss_count(self, batch: TrainBatch) -> Tensor:
        """() float32: the steps that the controller imitates, of which ``loss`` is the mean."""
        if self.config.controller is not None:
            return self.controller.loss_count(batch)
        imitated = batch.padding_mask if self.config.skills else batch.padding_mask[:, :-1]
        return imitated.sum().float()

    def _high_of(self, batch: TrainBatch) -> Tensor:
        """(B, K, high_level_dim)."""
        goals = None if batch.goals is None else batch.goals[:, None].expand(*batch.states.shape[:2], -1)
        return self.planner.recall_window(self.planner.perceive(batch.states, goals, batch.images), batch.padding_mask)

    def _latent_loss(self, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        hold, last = self.config.hold_steps, batch.states.shape[1] - 1
        low = self._low_of(batch)
        state = self.controller.encoder.normalised(batch.states)
        step = torch.arange(last, device=state.device)
        ends = last - hold * ((last - 1 - step) // hold)
        mask = batch.padding_mask[:, :-1]
        output = self.controller(low[:, :-1], self.embed_subgoal(state[:, ends] - state[:, :-1]))
        errors, measured = self._action_errors(output, batch.target_actions[:, :-1])
        num_planned = last + 1 - hold
        planned = self.planner(self._high_of(batch), None)[:, :num_planned]
        plan_errors = (planned - (state[:, hold:] - state[:, :num_planned])).square().mean(-1)
        weights, count = batch.weights_of_steps, self.loss_count(batch)
        plan_loss = _weighted_sum(plan_errors, batch.padding_mask[:, :num_planned], _first(weights, num_planned), count)
        metrics = {name: masked_mean(value, mask) for name, value in measured.items()}
        controller_loss = _weighted_sum(errors, mask, _first(weights, last), count)
        return controller_loss + plan_loss, {**metrics, "planner_loss": plan_loss}

    def _skill_loss(self, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        sketches = Sketches.of(batch.tasks, batch.instructions, self.config.skills or (), batch.states.device)
        num, steps, count = *batch.states.shape[:2], sketches.skills.shape[1]
        low = self._low_of(batch)
        low = low[:, :, None].expand(-1, -1, count, -1)
        subgoal = self.embed_subgoal(sketches.skills)[:, None].expand(num, steps, count, -1)
        targets = batch.target_actions[:, :, None].expand(num, steps, count, -1)
        output = self.controller(low, subgoal)
        errors, measured = self._action_errors(output, targets)
        explained = -errors if self.config.head == "discrete" else -errors * (self.config.action_dim / _ACTION_STD**2)
        stops = self.stop_logits(low, subgoal)
        # Where only the clock decides, a change is as likely at one step as at another.
        stops = torch.full_like(explained, -2.0) if stops is None else stops
        explained = torch.where(batch.padding_mask[..., None], explained, 0.0)
        arguments = (sketches, batch.padding_mask, self._surroundings(sketches, batch))
        surprise = -log_likelihood(explained, stops, *arguments)
        running = posterior(explained, stops, *arguments)
        weights, num_terms = batch.weights_of_steps, self.loss_count(batch)
        if weights is not None and weights.ndim == 2:
            # The likelihood of a window cannot be weighed step by step.
            weights = (weights * batch.padding_mask).sum(1) / batch.padding_mask.sum(1).clamp(min=1)
        controller_loss = _weighted_sum(surprise, torch.ones_like(batch.success), weights, num_terms)
        if self.config.planner == "sketch":
            plan_loss, accuracy = self._reading_loss(sketches, batch, num_terms)
        else:
            plan_loss, accuracy = self._plan_loss(sketches, running, batch, num_terms)
        metrics = {name: masked_mean((value * running).sum(-1), batch.padding_mask) for name, value in measured.items()}
        return controller_loss + plan_loss, {**metrics, "planner_loss": plan_loss, "planner_accuracy": accuracy}

    def _surroundings(self, sketches: Sketches, batch: TrainBatch) -> Surroundings:
        if self.config.alignment == "window":
            begins = ~batch.padding_mask[:, 0] | (batch.timesteps[:, 0] == 0)
            return Surroundings.of_windows(sketches, begins)
        if batch.steps_left is None:
            raise DataError("alignment='episode' needs a batch's steps_left; give them, or align windows by themselves")
        before = batch.timesteps[:, -1] + 1 - batch.padding_mask.sum(1)
        return Surroundings.of_episodes(sketches, batch.padding_mask, before, batch.steps_left, batch.success)

    def _reading_loss(self, sketches: Sketches, batch: TrainBatch, num_terms: Tensor) -> tuple[Tensor, Tensor]:
        """Each window's clauses count as much as its steps."""
        assert batch.goals is not None  # require_batch has seen to it
        errors, right, is_told = self.planner.errors(batch.goals, sketches)
        steps = batch.padding_mask & is_told[:, None]
        loss = _weighted_sum(errors[:, None].expand(steps.shape), steps, batch.weights_of_steps, num_terms)
        return loss, masked_mean(right, is_told)

    def _plan_loss(
        self, sketches: Sketches, running: Tensor, batch: TrainBatch, num_terms: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy against (B, K, N) skills; a step is told the skill before it, another one of the episode's or,
        half of the time, none.
        """
        num_skills, steps = len(self.config.skills or ()), running.shape[1]
        index = sketches.skills[:, None].expand(-1, steps, -1)
        labels = torch.zeros(*running.shape[:2], num_skills, device=running.device, dtype=running.dtype)
        labels = labels.scatter_add(2, index, running)
        before = torch.roll(labels.argmax(-1), 1, 1)
        is_known = torch.roll(batch.padding_mask, 1, 1)
        is_known[:, 0] = False
        if self.training:
            chance = torch.rand(3, *is_known.shape, device=is_known.device)
            is_known = is_known & (chance[0] < 0.5)
            drawn = (chance[1] * sketches.lengths[:, None]).long()
            is_wrong = chance[2] < self.config.previous_skill_noise
            before = torch.where(is_wrong, sketches.skills.gather(1, drawn), before)
        logits = self.planner(self._high_of(batch), torch.where(is_known, before, num_skills))
        errors = cross_entropy(logits.transpose(1, 2), labels.transpose(1, 2), reduction="none")
        right = (logits.argmax(-1) == labels.argmax(-1)).float()
        loss = _weighted_sum(errors, batch.padding_mask, batch.weights_of_steps, num_terms)
        return loss, masked_mean(right, batch.padding_mask)

    def _member_loss(self, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        skills = self.config.skills or []
        sketches = Sketches.of(batch.tasks, batch.instructions, skills, batch.states.device)
        is_single = sketches.lengths == 1
        given = torch.ones_like(is_single, dtype=torch.float32) if batch.weights is None else batch.weights
        skill = sketches.skills[:, 0]
        alone = replace(
            batch,
            goals=self.embed_subgoal(skill),
            instructions=tuple(skills[index] for index in skill.tolist()),
            weights=given * is_single,
        )
        controller_loss, metrics = self.controller.loss(alone)
        first = torch.nn.functional.one_hot(torch.zeros_like(skill), sketches.skills.shape[1]).float()
        running = first[:, None] * batch.padding_mask[..., None]
        told = replace(batch, weights=alone.weights)
        plan_loss, accuracy = self._plan_loss(sketches, running, told, self.loss_count(batch))
        named = {f"controller_{name}": value for name, value in metrics.items()}
        return controller_loss + plan_loss, {**named, "planner_loss": plan_loss, "planner_accuracy": accuracy}

    def _low_of(self, batch: TrainBatch) -> Tensor:
        """(B, K, low_level_dim)."""
        return self.controller.recall_window(self.controller.perceive(batch.states, batch.images), batch.padding_mask)

    def _action_errors(self, output: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(..., A) outputs and targets to (...) errors, half the mean square or the cross-entropy, and to reports."""
        if self.config.head == "discrete":
            choice = target.argmax(-1)
            errors = cross_entropy(output.movedim(-1, 1), choice, reduction="none")
            return errors, {"accuracy": (output.argmax(-1) == choice).float()}
        difference = output - target
        return 0.5 * difference.square().mean(-1), {"action_error": difference.abs().mean(-1)}


def _weighted_sum(terms: Tensor, mask: Tensor, weights: Tensor | None, count: Tensor) -> Tensor:
    """As ``masked_mean``, over another count than that of the mask."""
    return masked_mean(terms, mask, weights) * (mask.sum() / count.clamp(min=1))


def _first(weights: Tensor | None, steps: int) -> Tensor | None:
    """Weights of the first steps of each window, where they are weights of steps."""
    return weights[:, :steps] if weights is not None and weights.ndim == 2 else weights


def _build_member(config: HierarchicalVLAConfig) -> Any:
    from vla_dist.models.zoo import architecture  # the zoo knows this member too

    settings = dict(cast("dict[str, Any]", config.controller))
    member = architecture(settings.pop("architecture", ""))
    # The controller's wiring follows from the whole; a clash is refused by the member's own config.
    shared = {
        "state_dim": config.state_dim,
        "action_dim": config.action_dim,
        "context_steps": config.context_steps,
        "horizon": config.horizon,
        "goal_dim": config.subgoal_dim,
        "head": config.head,
        "cameras": config.cameras,
        "visual": config.visual,
    }
    known = setting_types(member.config)
    require_settings(f"controller {member.name}", known, settings)
    fitting = {name: value for name, value in shared.items() if name in known}
    return member.model(member.config(**{**fitting, **settings}))


AutoConfig.register(HierarchicalVLAConfig.model_type, HierarchicalVLAConfig, exist_ok=True)
AutoModel.register(HierarchicalVLAConfig, HierarchicalVLA, exist_ok=True)
