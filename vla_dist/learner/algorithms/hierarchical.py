"""Two levels trained at once on the same windows: a planner of subgoals and a controller that pursues them."""

from typing import Any

from vla_dist.core.errors import ConfigError
from vla_dist.learner.algorithms.behaviour_cloning import BehaviourCloning
from vla_dist.models.conditioning import ConditioningKind
from vla_dist.models.hierarchical.config import HierarchicalVLAConfig
from vla_dist.models.member import PolicyModelConfig


class Hierarchical(BehaviourCloning):
    """Cross-entropy of the planner's skill plus the controller's imitation given that skill, without a gradient between
    the levels; without named skills the planner predicts the state that the hold reached.

    Source: Gupta et al. 2019, "Relay Policy Learning", section 4; which skill was running is latent, Shiarlis et al.
    2018, "TACO", section 4.
    """

    def __init__(self, settings: Any, *, model: PolicyModelConfig, conditioning: ConditioningKind) -> None:
        super().__init__(settings, model=model, conditioning=conditioning)
        if not isinstance(model, HierarchicalVLAConfig):
            raise ConfigError("hierarchical needs model.architecture hierarchical; or use behaviour_cloning")
