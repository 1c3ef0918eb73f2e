"""The zoo: every architecture by name, with what builds it. A member enters it with one entry here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from vla_dist.core.errors import ConfigError
from vla_dist.core.protocols import Policy
from vla_dist.core.specs import EnvSpec
from vla_dist.models.bcz import presets as bcz_presets
from vla_dist.models.bcz.bcz import BCZ, BCZConfig
from vla_dist.models.composed import presets as composed_presets
from vla_dist.models.composed.vla import ComposedVLA, ComposedVLAConfig
from vla_dist.models.decision_transformer import presets as decision_transformer_presets
from vla_dist.models.decision_transformer.config import VlaDecisionTransformerConfig
from vla_dist.models.decision_transformer.decision_transformer import DecisionTransformer
from vla_dist.models.decision_transformer.policy import DecisionTransformerPolicy
from vla_dist.models.hierarchical import presets as hierarchical_presets
from vla_dist.models.hierarchical.config import HierarchicalVLAConfig
from vla_dist.models.hierarchical.hierarchical_vla import HierarchicalVLA
from vla_dist.models.hierarchical.policy import HierarchicalPolicy
from vla_dist.models.member import setting_types
from vla_dist.models.memory import presets as memory_presets
from vla_dist.models.memory.memory_vla import MemoryAugmentedVLA, MemoryAugmentedVLAConfig
from vla_dist.models.memory.policy import MemoryPolicy
from vla_dist.models.rt1 import presets as rt1_presets
from vla_dist.models.rt1.rt1 import RT1, RT1Config
from vla_dist.models.settings import did_you_mean, require_settings
from vla_dist.models.visuomotor_policy import VisuomotorPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One member. ``model`` and ``config`` keep the promises of ``member.PolicyModel``."""

    name: str
    """As manifests, run configs and the command line call it."""
    config: type[PreTrainedConfig]
    model: Callable[[Any], Any]
    """The class, called with a config; a ``PolicyModel``."""
    policy: Callable[..., Policy[Any]]
    """The class, called with (model, spec, conditioning=, goals=)."""
    presets: Mapping[str, Callable[..., PreTrainedConfig]]
    """size -> function of (spec, **changes); ``tiny`` (CPU seconds), ``small`` and the paper's own sizes."""
    source: str
    """The paper."""

    def configure(self, preset: str, spec: EnvSpec, **changes: Any) -> Any:
        """The config of a named size for this spec, with changes.

        Raises:
            ConfigError: no such preset or setting, with the nearest name.
        """
        if preset not in self.presets:
            hint = did_you_mean(preset, self.presets)
            raise ConfigError(f"no model preset {preset!r}; {hint}{self.name} has {', '.join(self.presets)}")
        require_settings(self.name, setting_types(self.config), changes)
        return self.presets[preset](spec, **changes)


ARCHITECTURES: dict[str, Architecture] = {
    member.name: member
    for member in (
        Architecture(
            name="decision_transformer",
            config=VlaDecisionTransformerConfig,
            model=DecisionTransformer,
            policy=DecisionTransformerPolicy,
            presets=decision_transformer_presets.PRESETS,
            source="Chen et al. 2021, Decision Transformer, https://arxiv.org/abs/2106.01345",
        ),
        Architecture(
            name="hierarchical",
            config=HierarchicalVLAConfig,
            model=HierarchicalVLA,
            policy=HierarchicalPolicy,
            presets=hierarchical_presets.PRESETS,
            source="Gupta et al. 2019, Relay Policy Learning, https://arxiv.org/abs/1910.11956",
        ),
        Architecture(
            name="memory",
            config=MemoryAugmentedVLAConfig,
            model=MemoryAugmentedVLA,
            policy=MemoryPolicy,
            presets=memory_presets.PRESETS,
            source="Graves et al. 2016, Hybrid computing (DNC), https://doi.org/10.1038/nature20101, much simplified",
        ),
        Architecture(
            name="rt1",
            config=RT1Config,
            model=RT1,
            policy=VisuomotorPolicy,
            presets=rt1_presets.PRESETS,
            source="Brohan et al. 2022, RT-1, https://arxiv.org/abs/2212.06817",
        ),
        Architecture(
            name="bcz",
            config=BCZConfig,
            model=BCZ,
            policy=VisuomotorPolicy,
            presets=bcz_presets.PRESETS,
            source="Jang et al. 2021, BC-Z, https://arxiv.org/abs/2202.02005",
        ),
        Architecture(
            name="vla",
            config=ComposedVLAConfig,
            model=ComposedVLA,
            policy=VisuomotorPolicy,
            presets=composed_presets.PRESETS,
            source="Any encoders with any fusion and any head; the flow head is that of Black et al. 2024, "
            "https://arxiv.org/abs/2410.24164",
        ),
    )
}


def architecture(name: str) -> Architecture:
    """A member by name. Raises ConfigError with the nearest one."""
    if name not in ARCHITECTURES:
        raise ConfigError(
            f"unknown architecture {name!r}; {did_you_mean(name, ARCHITECTURES)}this version builds "
            f"{', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def architecture_of(model: Any) -> Architecture:
    """The member that a model belongs to, by its config. Raises ConfigError where it belongs to none."""
    for member in ARCHITECTURES.values():
        if type(model.config) is member.config:
            return member
    raise ConfigError(
        f"{type(model).__name__} is not in the zoo ({', '.join(ARCHITECTURES)}); add an Architecture to models/zoo.py"
    )
