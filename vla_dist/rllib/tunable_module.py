"""A policy of the zoo that RLlib's own algorithms go on training: it starts as the policy and ends as a new version.

Shapes: B sequences, T steps of a sequence, K context steps, P proprio, A action, G goal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from gymnasium.spaces import Discrete
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis.value_function_api import ValueFunctionAPI
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule
from torch import Tensor, nn

from vla_dist.core.errors import ConfigError
from vla_dist.core.types import PolicyArtifact
from vla_dist.models.auto import build_model, make_artifact
from vla_dist.models.decision_transformer.decision_transformer import DecisionTransformer
from vla_dist.models.goals import GoalTable
from vla_dist.models.observations import goal_rows
from vla_dist.rllib.policy_module import SETTINGS, require_spaces
from vla_dist.rllib.policy_source import PolicySource

_FIRST_LOG_STD = -1.0
"""Of normalised actions, about 0.37: explores without losing what the policy can."""
_VALUE_WIDTH = 64
_HISTORY, _NUM_STEPS, _TIMESTEP = "history", "num_steps", "timestep"


class TunableModule(TorchRLModule, ValueFunctionAPI):
    """A Decision Transformer without return and action tokens, as a Gaussian (or categorical) policy with a value.

    Its mean (or its logits) are the policy's own output, so without training it acts as the policy does. With return or
    action tokens there is nothing sensible to fine-tune by rewards: what it does depends on what it is asked for.
    For PPO, IMPALA, BC and MARWIL.
    """

    def setup(self) -> None:
        """Raises:
        ConfigError: a policy that cannot be tuned, with the reasons.
        ContractMismatch: the environment's spaces are not those of the policy's robot.
        """
        settings = self.model_config[SETTINGS]
        artifact = PolicySource(**settings["source"]).load()
        model, self.conditioning, self.goals = build_model(artifact)
        self.artifact_name, self.robot = artifact.manifest.name, artifact.manifest.spec
        self.parent = artifact.manifest.version
        self.model = require_tunable(model)
        require_spaces(self.robot, self.observation_space, self.action_space)
        if self.robot.action_kind == "continuous" and not settings["normalises"]:
            raise ConfigError("a tunable policy gives actions within [-1, 1]; leave normalize_actions on")
        config = self.model.config
        self.register_buffer("goal", _goal(self.goals, str(settings["instruction"]), self.model), persistent=False)
        if not isinstance(self.action_space, Discrete):
            self.log_std = nn.Parameter(torch.full((config.action_dim,), _FIRST_LOG_STD))
        self.value = nn.Sequential(
            nn.Linear(config.state_dim, _VALUE_WIDTH),
            nn.Tanh(),
            nn.Linear(_VALUE_WIDTH, _VALUE_WIDTH),
            nn.Tanh(),
            nn.Linear(_VALUE_WIDTH, 1),
        )

    def get_initial_state(self) -> dict[str, Any]:
        """The last K - 1 readings, how many of them there are, and the step of the episode."""
        config = self.model.config
        return {
            _HISTORY: torch.zeros(config.context_steps - 1, config.state_dim),
            _NUM_STEPS: torch.zeros(1, dtype=torch.int64),
            _TIMESTEP: torch.zeros(1, dtype=torch.int64),
        }

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        readings, state = batch[Columns.OBS].float(), batch[Columns.STATE_IN]
        num, length, _ = readings.shape
        windows = _windows(readings, state, self.model.config.context_steps)
        goals = None if self.goal is None else self.goal.expand(len(windows.proprio), -1)
        blank = windows.proprio.new_zeros(*windows.proprio.shape[:2], self.model.config.action_dim)
        outputs = self.model.outputs(
            windows.proprio, blank, blank[..., 0], goals, windows.timesteps, windows.padding_mask
        )[:, -1]
        inputs = self.model.actions_from(outputs).view(num, length, -1)
        if not isinstance(self.action_space, Discrete):
            inputs = torch.cat([inputs, self.log_std.expand_as(inputs)], -1)
        return {Columns.ACTION_DIST_INPUTS: inputs, Columns.STATE_OUT: windows.after}

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> Tensor:
        """(B, T), from the newest reading alone."""
        readings = batch[Columns.OBS].float()
        return self.value((readings - self.model.proprio_mean) / self.model.proprio_std).squeeze(-1)

    def to_artifact(self, *, metrics: Mapping[str, float] | None = None) -> PolicyArtifact:
        """What it has become, for ``PolicyRegistry.publish``: the child of the version it started from."""
        return make_artifact(
            self.model,
            name=self.artifact_name,
            spec=self.robot,
            conditioning=self.conditioning,
            goals=self.goals,
            provenance={"tuned_by": "rllib"},
            parent=self.parent,
            metrics=metrics,
        )


def require_tunable(model: Any) -> DecisionTransformer:
    """Raises ConfigError with every reason why a model cannot be trained by rewards."""
    if not isinstance(model, DecisionTransformer):
        raise ConfigError(f"{type(model).__name__} is evaluated by PolicyModule; only a DecisionTransformer is tunable")
    config = model.config
    reasons = []
    if config.use_returns or config.use_previous_actions:
        reasons.append("it has return or action tokens (build it with use_returns=false use_previous_actions=false)")
    if config.head not in ("tanh", "discrete"):
        reasons.append(f"its head is {config.head!r}, expected tanh or discrete")
    if config.cameras:
        reasons.append(f"it looks at cameras {config.cameras}")
    if config.dropout:
        reasons.append(f"it has dropout {config.dropout}, which makes likelihoods of one action differ")
    if reasons:
        raise ConfigError(f"the policy cannot be tuned: {'; '.join(reasons)}. The preset 'tiny' can be")
    return model


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Windows:
    """The K steps up to each of B x T steps."""

    proprio: Tensor
    """(B T, K, P)."""
    timesteps: Tensor
    """(B T, K) int64."""
    padding_mask: Tensor
    """(B T, K) bool."""
    after: dict[str, Tensor]
    """The state after the last step."""


def _windows(readings: Tensor, state: Mapping[str, Tensor], num_context: int) -> _Windows:
    num, length, width = readings.shape
    history = torch.cat([state[_HISTORY].float(), readings], 1)
    proprio = history.unfold(1, num_context, 1).permute(0, 1, 3, 2).reshape(num * length, num_context, width)
    step = torch.arange(length, device=readings.device)
    known = (state[_NUM_STEPS].long() + step + 1).clamp(max=num_context).view(-1, 1)
    newest = (state[_TIMESTEP].long() + step).view(-1, 1)
    column = torch.arange(num_context, device=readings.device) - (num_context - 1)
    return _Windows(
        proprio=proprio,
        timesteps=(newest + column).clamp(min=0),
        padding_mask=column > -known,
        after={
            _HISTORY: history[:, length:],
            _NUM_STEPS: (state[_NUM_STEPS].long() + length).clamp(max=num_context - 1),
            _TIMESTEP: state[_TIMESTEP].long() + length,
        },
    )


def _goal(goals: GoalTable | None, instruction: str, model: DecisionTransformer) -> Tensor | None:
    """(1, G)."""
    if goals is None or not model.config.goal_dim:
        return None
    rows = goal_rows([instruction], goals, cast(np.ndarray, model.goal_mean.cpu().numpy()))
    return torch.from_numpy(rows)
