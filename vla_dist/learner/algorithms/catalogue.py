"""Every algorithm by name. One enters with an entry here."""

import typing
from collections.abc import Sequence
from difflib import get_close_matches

from vla_dist.core.errors import ConfigError
from vla_dist.learner.algorithms.algorithm import Algorithm
from vla_dist.learner.algorithms.behaviour_cloning import BehaviourCloning
from vla_dist.learner.algorithms.conditioned import Conditioned
from vla_dist.learner.algorithms.decision_transformer import DecisionTransformerAlgorithm, reads_returns
from vla_dist.learner.algorithms.hierarchical import Hierarchical
from vla_dist.learner.algorithms.memory import Memory
from vla_dist.learner.algorithms.online_decision_transformer import OnlineDecisionTransformer
from vla_dist.models.conditioning import ConditioningKind
from vla_dist.models.hierarchical.config import HierarchicalVLAConfig
from vla_dist.models.member import PolicyModelConfig
from vla_dist.models.memory.memory_vla import MemoryAugmentedVLAConfig
from vla_dist.models.settings import parse_changes

ALGORITHMS: dict[str, type[Algorithm]] = {
    "behaviour_cloning": BehaviourCloning,
    "decision_transformer": DecisionTransformerAlgorithm,
    "online_decision_transformer": OnlineDecisionTransformer,
    "hierarchical": Hierarchical,
    "memory": Memory,
    "conditioned": Conditioned,
}


def algorithm_for(model: PolicyModelConfig, conditioning: ConditioningKind) -> str:
    """Name of the algorithm that a model and its conditioning are made for."""
    if conditioning in ("success", "advantage", "reward_advantage"):
        return "conditioned"
    if isinstance(model, MemoryAugmentedVLAConfig):
        return "memory"
    if isinstance(model, HierarchicalVLAConfig):
        return "hierarchical"
    return "decision_transformer" if reads_returns(model) and conditioning != "none" else "behaviour_cloning"


def make_algorithm(
    name: str, changes: Sequence[str] = (), *, model: PolicyModelConfig, conditioning: ConditioningKind
) -> Algorithm:
    """An algorithm by name.

    Args:
        changes: ``name=value`` of its settings.

    Raises:
        ConfigError: an unknown algorithm or setting, a value that cannot work, or a model that it is not for.
    """
    if name not in ALGORITHMS:
        near = get_close_matches(name, ALGORITHMS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"no algorithm {name!r}; {hint}there are {', '.join(ALGORITHMS)}")
    kind = ALGORITHMS[name]
    settings = kind.Settings(**parse_changes(kind.Settings, changes, known=typing.get_type_hints(kind.Settings)))
    return kind(settings, model=model, conditioning=conditioning)
