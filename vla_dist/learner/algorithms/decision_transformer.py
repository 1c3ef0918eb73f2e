"""Decision Transformer: cloning of actions given the return that followed them."""

from typing import Any

from vla_dist.core.errors import ConfigError
from vla_dist.learner.algorithms.algorithm import Algorithm
from vla_dist.learner.algorithms.behaviour_cloning import HINDSIGHT
from vla_dist.models.conditioning import ConditioningKind
from vla_dist.models.member import PolicyModelConfig


def reads_returns(model: PolicyModelConfig) -> bool:
    """Whether a member has an input for returns or for what stands in their place."""
    return bool(getattr(model, "use_returns", False))


class DecisionTransformerAlgorithm(Algorithm):
    """The model's own loss at all valid steps, on returns-to-go of complete episodes.

    Source: Chen et al. 2021, "Decision Transformer", section 3 and algorithm 1.
    """

    def __init__(self, settings: Any, *, model: PolicyModelConfig, conditioning: ConditioningKind) -> None:
        super().__init__(settings, model=model, conditioning=conditioning)
        if not reads_returns(model) or conditioning not in HINDSIGHT:
            raise ConfigError(
                f"decision_transformer needs a model that reads returns (use_returns=true) and a conditioning of "
                f"{' or '.join(HINDSIGHT)}, got {conditioning!r}; or use behaviour_cloning"
            )
