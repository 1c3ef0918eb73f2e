"""Behaviour cloning: every member of the zoo with the loss of its own head, on actions or on chunks of them."""

from typing import Any

from vla_dist.core.errors import ConfigError
from vla_dist.learner.algorithms.algorithm import Algorithm
from vla_dist.models.conditioning import ConditioningKind
from vla_dist.models.member import PolicyModelConfig

HINDSIGHT: tuple[ConditioningKind, ...] = ("steps_to_success", "reward")
"""Conditionings that are computed from complete episodes alone."""


class BehaviourCloning(Algorithm):
    """Imitates ``target_actions``: the teacher's label where there is one, else the executed action.

    Source: Pomerleau 1989, "ALVINN"; chunks of actions as in Zhao et al. 2023, "ACT", section IV.
    """

    def __init__(self, settings: Any, *, model: PolicyModelConfig, conditioning: ConditioningKind) -> None:
        super().__init__(settings, model=model, conditioning=conditioning)
        if conditioning not in ("none", *HINDSIGHT):
            raise ConfigError(f"behaviour_cloning gives conditioning {conditioning!r} no values; use conditioned")
