"""Policies from artifacts and artifacts from models: the only place that knows architectures by name."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from difflib import get_close_matches
from typing import Any, cast

import numpy as np
import torch

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Array, PolicyArtifact, PolicyManifest
from vla_dist.models.conditioning import ReturnConditioning
from vla_dist.models.decision_transformer import DecisionTransformer, VlaDecisionTransformerConfig
from vla_dist.models.goals import Embed, GoalTable
from vla_dist.models.language_encoder import MINILM, shared_embedder
from vla_dist.models.policy import DecisionTransformerPolicy

GOAL_EMBEDDINGS = "goal_embeddings"
"""(N, G) float32 beside the weights: the vectors of ``config['instructions']``."""


def build_policy(
    artifact: PolicyArtifact, *, embed: Embed | None = None, device: str = "cpu"
) -> DecisionTransformerPolicy:
    """A ready policy.

    Args:
        embed: for instructions outside the artifact's table; None: the language model named in the artifact, loaded
            when the first such instruction comes.

    Raises:
        ConfigError: an unknown architecture or setting.
        DataError: tensors that are missing, too many, or of another shape.
    """
    name = artifact.manifest.architecture
    if name not in _BUILDERS:
        near = get_close_matches(name, _BUILDERS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"unknown architecture {name!r}; {hint}this version builds {', '.join(_BUILDERS)}")
    return _BUILDERS[name](artifact, embed, device)


def make_artifact(
    model: DecisionTransformer,
    *,
    name: str,
    spec: EnvSpec,
    conditioning: ReturnConditioning,
    goals: GoalTable | None = None,
    language_model: str = MINILM,
    provenance: Mapping[str, Any] | None = None,
    parent: int = 0,
    metrics: Mapping[str, float] | None = None,
    created_unix_s: float = 0.0,
    git_revision: str = "",
) -> PolicyArtifact:
    """A model as it travels: settings as JSON, weights and known goal vectors as arrays.

    Args:
        goals: instructions that a policy shall know without loading the language model.
        provenance: how it was trained, plain JSON, for people and for whoever asks whether it was published before.
    """
    tensors = {key: value.detach().cpu().numpy().copy() for key, value in model.state_dict().items()}
    instructions: tuple[str, ...] = ()
    if model.config.goal_dim and goals is not None:
        instructions, embeddings = goals.contents()
        if instructions:
            tensors[GOAL_EMBEDDINGS] = embeddings
    config = {
        "model": model_settings(model.config),
        "conditioning": asdict(conditioning),
        "instructions": list(instructions),
        "language_model": language_model,
        "provenance": dict(provenance or {}),
    }
    manifest = PolicyManifest(
        name=name,
        architecture="decision_transformer",
        config=config,
        spec=spec,
        horizon=1,
        parent=parent,
        metrics=dict(metrics or {}),
        created_unix_s=created_unix_s,
        git_revision=git_revision,
    )
    return PolicyArtifact(manifest=manifest, tensors=tensors)


def model_settings(config: VlaDecisionTransformerConfig) -> dict[str, Any]:
    """The config's own fields as plain JSON: enough to build an equal model."""
    return {field: getattr(config, field) for field in VlaDecisionTransformerConfig.__annotations__}


def load_tensors(model: torch.nn.Module, tensors: Mapping[str, Array]) -> None:
    """Fill every parameter and buffer of the model, by name.

    Raises:
        DataError: naming each tensor that is missing, unknown, of another shape, or not finite.
    """
    expected = model.state_dict()
    wrong = [f"{name} is missing" for name in expected if name not in tensors]
    wrong += [f"{name} is unknown" for name in tensors if name not in expected]
    for name in expected.keys() & tensors.keys():
        shape, given = tuple(expected[name].shape), np.asarray(tensors[name])
        if given.shape != shape:
            wrong.append(f"{name} has shape {given.shape}, expected {shape}")
        elif not np.isfinite(given).all():
            wrong.append(f"{name} is not finite")
    if wrong:
        shown = "; ".join(sorted(wrong)[:10]) + (f"; and {len(wrong) - 10} more" if len(wrong) > 10 else "")
        raise DataError(f"the tensors do not fit the model: {shown}. They belong to another config or were damaged")
    model.load_state_dict({name: torch.from_numpy(np.array(tensors[name])) for name in expected})


def _build_decision_transformer(
    artifact: PolicyArtifact, embed: Embed | None, device: str
) -> DecisionTransformerPolicy:
    manifest, config = artifact.manifest, artifact.manifest.config
    try:
        model_config = VlaDecisionTransformerConfig(**config["model"])
        conditioning = ReturnConditioning(**config["conditioning"])
        instructions, language_model = list(config["instructions"]), str(config["language_model"])
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"the config of {manifest.name!r} version {manifest.version} lacks or misnames {error}; it must come "
            "from make_artifact"
        ) from error
    weights = dict(artifact.tensors)
    table = weights.pop(GOAL_EMBEDDINGS, None)
    if table is not None and table.shape != (len(instructions), model_config.goal_dim):
        raise DataError(
            f"{GOAL_EMBEDDINGS} has shape {table.shape}, expected ({len(instructions)}, {model_config.goal_dim})"
        )
    model = DecisionTransformer(model_config)
    load_tensors(model, weights)
    cast(torch.nn.Module, model).to(device)
    goals = None
    if model_config.goal_dim:
        known = instructions if table is not None else []
        goals = GoalTable(embed or shared_embedder(language_model).embed, instructions=known, embeddings=table)
    return DecisionTransformerPolicy(model, manifest.spec, conditioning=conditioning, goals=goals)


_BUILDERS: dict[str, Callable[[PolicyArtifact, Embed | None, str], DecisionTransformerPolicy]] = {
    "decision_transformer": _build_decision_transformer
}
