"""Online Decision Transformer: a policy that keeps exploring while it learns from what it tried.

Shapes: B windows, K context steps, A action.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from vla_dist.core.errors import ConfigError
from vla_dist.learner.algorithms.algorithm import Algorithm
from vla_dist.learner.algorithms.behaviour_cloning import HINDSIGHT
from vla_dist.learner.algorithms.decision_transformer import reads_returns
from vla_dist.models.batch import TrainBatch
from vla_dist.models.conditioning import ConditioningKind, ReturnConditioning
from vla_dist.models.decision_transformer.decision_transformer import DecisionTransformer
from vla_dist.models.member import PolicyModel, PolicyModelConfig, masked_mean
from vla_dist.models.squashed_gaussian import SquashedGaussian


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineDecisionTransformerSettings:
    """Of the entropy, and of what rollouts are asked for."""

    target_entropy: float = -1.0
    """Nats for each action dimension; log 2 = 0.69 is uniform over [-1, 1], the paper's is -1."""
    first_temperature: float = 0.1
    """Price of a missing nat at the start; it is learnt."""
    exploration_quantile: float = 0.9
    """How good an episode, among the policy's recent ones, rollouts that explore ask for."""
    recent_episodes: int = 100
    """Of the policy, for each task."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.target_entropy) and self.target_entropy < math.log(2)):
            raise ConfigError(f"target_entropy {self.target_entropy} must be below 0.69, that of uniform actions")
        if not self.first_temperature > 0 or not 0 <= self.exploration_quantile <= 1 or self.recent_episodes < 1:
            raise ConfigError(
                f"first_temperature {self.first_temperature} must be above 0, exploration_quantile "
                f"{self.exploration_quantile} within 0..1, recent_episodes {self.recent_episodes} at least 1"
            )


class OnlineDecisionTransformer(Algorithm):
    """Likelihood of the actions given the returns that followed, under a lower bound on the policy's entropy.

    Returns are hindsight ones: the replay computes them from complete episodes, online ones included. Means are over
    valid steps alone, that of the entropy too: pads have an entropy as well, and it is nobody's.

    Rollouts ask for an upper quantile of what the policy reached lately, seen in windows that hold an episode's first
    step; until there are any, for what robots ask for.

    Source: Zheng et al. 2022, "Online Decision Transformer", equations 5 and 6 and algorithm 2. The paper asks for
    twice the expert's return; a quantile of what was reached needs no expert.
    """

    Settings = OnlineDecisionTransformerSettings
    settings: OnlineDecisionTransformerSettings

    def __init__(self, settings: Any, *, model: PolicyModelConfig, conditioning: ConditioningKind) -> None:
        super().__init__(settings, model=model, conditioning=conditioning)
        if not reads_returns(model) or model.head != "gaussian" or conditioning not in HINDSIGHT:
            raise ConfigError(
                "online_decision_transformer needs a decision transformer with head=gaussian and use_returns=true and "
                f"a conditioning of {' or '.join(HINDSIGHT)}; got head {model.head!r} and conditioning {conditioning!r}"
            )
        self.log_temperature = nn.Parameter(torch.tensor([math.log(settings.first_temperature)]))
        self._recent: dict[str, OrderedDict[int, float]] = {}
        self._tasks: dict[str, str] = {}

    def loss(self, model: PolicyModel, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        outputs = cast(DecisionTransformer, model).outputs_of(batch)
        distribution = SquashedGaussian.of(outputs.float())
        surprise, entropy = -distribution.log_prob(batch.target_actions), distribution.entropy()
        wanted = self.settings.target_entropy * model.config.action_dim
        temperature = self.log_temperature.exp()
        terms = surprise - temperature.detach() * entropy
        # The second term has a gradient for the temperature alone, which rises while the entropy is too low.
        constraint = masked_mean(temperature * (entropy.detach() - wanted), batch.padding_mask)
        loss = masked_mean(terms, batch.padding_mask, batch.weights_of_steps) + constraint
        error = (distribution.mode() - batch.target_actions).abs().mean(-1)
        measured = {"surprise": surprise, "entropy": entropy, "action_error": error}
        metrics = {name: masked_mean(value.detach(), batch.padding_mask) for name, value in measured.items()}
        return loss, {"loss": loss.detach(), "temperature": temperature.detach().squeeze(), **metrics}

    def prepare(self, batch: TrainBatch) -> TrainBatch:
        """Notes what the policy's episodes came to."""
        if batch.episodes is None or batch.policy_versions is None:
            return batch
        begins = batch.padding_mask & (batch.timesteps == 0)
        rows = (begins.any(1) & (batch.policy_versions > 0)).nonzero().flatten()
        whole = batch.returns_to_go[rows, begins[rows].float().argmax(1)].tolist()
        for row, episode, value in zip(rows.tolist(), batch.episodes[rows].tolist(), whole, strict=True):
            self._tasks[batch.instructions[row]] = batch.tasks[row]
            recent = self._recent.setdefault(batch.tasks[row], OrderedDict())
            recent[episode] = value
            if len(recent) > self.settings.recent_episodes:
                del recent[min(recent)]
        return batch

    def publishable(self, conditioning: ReturnConditioning) -> ReturnConditioning:
        quantile = self.settings.exploration_quantile
        by_task = {
            task: float(np.quantile(list(recent.values()), quantile)) * conditioning.scale
            for task, recent in self._recent.items()
        }
        if not by_task:
            return conditioning
        targets = {words: by_task[task] for words, task in self._tasks.items()}
        return replace(conditioning, exploration_targets={**targets, "": max(by_task.values())})

    def memory(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        recent = {task: list(map(list, found.items())) for task, found in self._recent.items()}
        return {}, {"recent": recent, "tasks": dict(self._tasks)}

    def load_memory(self, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        self._recent = {task: OrderedDict(map(tuple, found)) for task, found in notes["recent"].items()}
        self._tasks = dict(notes["tasks"])
