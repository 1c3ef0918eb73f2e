"""Named sizes of the Decision Transformer, each a function of the robot's spec."""

from collections.abc import Callable
from typing import Any

from vla_dist.core.specs import EnvSpec
from vla_dist.models.decision_transformer.config import VlaDecisionTransformerConfig
from vla_dist.models.robot_settings import robot_settings, small_eyes


def _for_spec(spec: EnvSpec, size: dict[str, Any], changes: dict[str, Any]) -> VlaDecisionTransformerConfig:
    settings = {
        **robot_settings(spec, head="tanh"),
        "max_episode_len": spec.max_episode_steps,
        "visual": small_eyes(spec),
    }
    return VlaDecisionTransformerConfig(**{**settings, **size, **changes})


def tiny(spec: EnvSpec, **changes: Any) -> VlaDecisionTransformerConfig:
    """Seconds on a CPU: one token a step, no returns, no past actions. The honest baseline on expert data."""
    size = {
        "hidden_dim": 64,
        "n_layers": 2,
        "n_heads": 4,
        "context_steps": 5,
        "dropout": 0.0,
        "goal_fusion": "add",
        "use_returns": False,
        "use_previous_actions": False,
    }
    return _for_spec(spec, size, changes)


def small(spec: EnvSpec, **changes: Any) -> VlaDecisionTransformerConfig:
    """Minutes on a CPU: three tokens a step with half of the action tokens hidden in training."""
    size = {
        "hidden_dim": 128,
        "n_layers": 3,
        "n_heads": 4,
        "context_steps": 10,
        "dropout": 0.0,
        "action_dropout": 0.5,
        "return_dropout": 0.1,
    }
    return _for_spec(spec, size, changes)


def mini(spec: EnvSpec, **changes: Any) -> VlaDecisionTransformerConfig:
    """The demo's: three tokens a step, narrower and with a shorter memory than ``small``."""
    size = {
        "hidden_dim": 64,
        "n_layers": 2,
        "n_heads": 4,
        "context_steps": 5,
        "dropout": 0.0,
        "action_dropout": 0.5,
        "return_dropout": 0.2,
    }
    return _for_spec(spec, size, changes)


def gym(spec: EnvSpec, **changes: Any) -> VlaDecisionTransformerConfig:
    """The paper's Gym setting: 3 layers, 1 head, width 128, K 20, ReLU, absolute timesteps."""
    size = {
        "hidden_dim": 128,
        "n_layers": 3,
        "n_heads": 1,
        "context_steps": 20,
        "activation": "relu",
        "dropout": 0.1,
        "position": "timestep",
    }
    return _for_spec(spec, size, changes)


def online(spec: EnvSpec, **changes: Any) -> VlaDecisionTransformerConfig:
    """Online Decision Transformer's size: 4 layers of width 512."""
    size = {"hidden_dim": 512, "n_layers": 4, "n_heads": 4, "context_steps": 20, "activation": "relu"}
    return _for_spec(spec, size, changes)


def base(spec: EnvSpec, **changes: Any) -> VlaDecisionTransformerConfig:
    """For a GPU: 6 layers of width 512."""
    return _for_spec(spec, {"hidden_dim": 512, "n_layers": 6, "n_heads": 8, "context_steps": 20}, changes)


PRESETS: dict[str, Callable[..., VlaDecisionTransformerConfig]] = {
    "tiny": tiny,
    "mini": mini,
    "small": small,
    "gym": gym,
    "online": online,
    "base": base,
}
