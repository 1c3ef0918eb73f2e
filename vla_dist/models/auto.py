"""Policies from artifacts and artifacts from models, whatever the architecture."""

import copy
import functools
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

import numpy as np
import torch

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.core.protocols import Policy
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Array, PolicyArtifact, PolicyManifest
from vla_dist.models.chunking import ChunkExecution
from vla_dist.models.clauses import goal_embed
from vla_dist.models.conditioning import ReturnConditioning
from vla_dist.models.goals import Embed, GoalTable
from vla_dist.models.language_encoder import MINILM, shared_embedder
from vla_dist.models.member import PolicyModel, PolicyModelConfig, as_module, own_settings, setting_types
from vla_dist.models.settings import require_settings
from vla_dist.models.zoo import Architecture, architecture, architecture_of

GOAL_EMBEDDINGS = "goal_embeddings"
"""(N, G) float32 beside the weights: the vectors of ``config['instructions']``."""


def build_policy(
    artifact: PolicyArtifact, *, embed: Embed | None = None, device: str = "cpu", explores: bool = False
) -> Policy[Any]:
    """A ready policy; arguments and errors are those of ``build_model`` and ``build_executed_policy``."""
    model, conditioning, goals = build_model(artifact, embed=embed, device=device)
    conditioning = conditioning.exploring() if explores else conditioning
    member = architecture(artifact.manifest.architecture)
    return member.policy(model, artifact.manifest.spec, conditioning=conditioning, goals=goals)


def build_model(
    artifact: PolicyArtifact, *, embed: Embed | None = None, device: str = "cpu"
) -> tuple[PolicyModel, ReturnConditioning, GoalTable | None]:
    """The model of an artifact and what its policy needs beside it; no goal table where it reads no goals.

    Args:
        embed: for instructions outside the artifact's table; None: the language model named in the artifact, loaded
            when the first such instruction comes.

    Raises:
        ConfigError: an unknown architecture or setting.
        DataError: tensors that are missing, too many, or of another shape.
    """
    manifest = artifact.manifest
    member = architecture(manifest.architecture)
    try:
        config = member.config(**_known_settings(member, manifest.config["model"]))
        conditioning = ReturnConditioning(**manifest.config["conditioning"])
        instructions = list(manifest.config["instructions"])
        language_model = str(manifest.config["language_model"])
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"the config of {manifest.name!r} version {manifest.version} lacks or misnames {error}; it must come "
            "from make_artifact"
        ) from error
    weights = dict(artifact.tensors)
    table = weights.pop(GOAL_EMBEDDINGS, None)
    goal_dim = cast(PolicyModelConfig, config).goal_dim
    if table is not None and table.shape != (len(instructions), goal_dim):
        raise DataError(f"{GOAL_EMBEDDINGS} has shape {table.shape}, expected ({len(instructions)}, {goal_dim})")
    skeleton = _kept_skeleton(member.name, json.dumps(manifest.config["model"], sort_keys=True))
    model: Any = member.model(config) if skeleton is None else copy.deepcopy(skeleton)
    load_tensors(model, weights, assign=skeleton is not None)
    cast(torch.nn.Module, model).to(device)
    goals = None
    if goal_dim:
        known = instructions if table is not None else []
        whole = embed or shared_embedder(language_model).embed
        goals = GoalTable(goal_embed(whole, config), instructions=known, embeddings=table)
    return model, conditioning, goals


def build_executed_policy(
    artifact: PolicyArtifact, *, execution: ChunkExecution, explores: bool = False
) -> Policy[Any]:
    """A ready policy whose chunks are executed by this rule. Raises as ``build_policy`` does.

    Where a chunk is simply executed to its end and the policy remembers nothing, it gives the chunk itself: then a
    robot need not ask at every step. A policy that remembers must see every observation, as it did in training.

    Args:
        explores: asks for what the learner wants to see tried, see ``ReturnConditioning.exploring``.
    """
    policy = build_policy(artifact, explores=explores)
    goes_to_robot = execution == ChunkExecution() and policy.context_steps == 1
    return policy if policy.horizon == 1 or goes_to_robot else execution.wrap(policy)


def make_artifact(
    model: PolicyModel,
    *,
    name: str,
    spec: EnvSpec,
    conditioning: ReturnConditioning,
    weights: Mapping[str, torch.Tensor] | None = None,
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
        weights: to send in place of the model's own, all of them: a moving average, or what ranks held in parts.
        goals: instructions that a policy shall know without loading the language model.
        provenance: how it was trained, plain JSON, for people and for whoever asks whether it was published before.
    """
    state = as_module(model).state_dict() if weights is None else weights
    tensors = {key: value.detach().cpu().numpy().copy() for key, value in state.items()}
    instructions: tuple[str, ...] = ()
    if model.config.goal_dim and goals is not None:
        instructions, embeddings = goals.contents()
        if instructions:
            tensors[GOAL_EMBEDDINGS] = embeddings
    config = {
        "model": own_settings(model.config),
        "conditioning": asdict(conditioning),
        "instructions": list(instructions),
        "language_model": language_model,
        "provenance": dict(provenance or {}),
    }
    manifest = PolicyManifest(
        name=name,
        architecture=architecture_of(model).name,
        config=config,
        spec=spec,
        horizon=model.config.horizon,
        parent=parent,
        metrics=dict(metrics or {}),
        created_unix_s=created_unix_s,
        git_revision=git_revision,
    )
    return PolicyArtifact(manifest=manifest, tensors=tensors)


def load_tensors(model: torch.nn.Module, tensors: Mapping[str, Array], *, assign: bool = False) -> None:
    """Fill every parameter and buffer of the model, by name.

    Args:
        model: whose values are overwritten.
        tensors: copied; never shared with the model.
        assign: put new tensors in place of the model's own, which may be on the meta device then and are left alone.

    Raises:
        DataError: naming each tensor that is missing, unknown, of another shape or type, or not finite.
    """
    expected = model.state_dict()
    wrong = [f"{name} is missing" for name in expected if name not in tensors]
    wrong += [f"{name} is unknown" for name in tensors if name not in expected]
    for name in expected.keys() & tensors.keys():
        shape, given = tuple(expected[name].shape), np.asarray(tensors[name])
        if given.shape != shape:
            wrong.append(f"{name} has shape {given.shape}, expected {shape}")
        elif (given.dtype.kind == "f") != expected[name].is_floating_point() or given.dtype.kind not in "fiub":
            wrong.append(f"{name} is of {given.dtype}, expected {expected[name].dtype}")
        elif not np.isfinite(given).all():
            wrong.append(f"{name} is not finite")
    if wrong:
        shown = "; ".join(sorted(wrong)[:10]) + (f"; and {len(wrong) - 10} more" if len(wrong) > 10 else "")
        raise DataError(f"the tensors do not fit the model: {shown}. They belong to another config or were damaged")
    given = {name: torch.from_numpy(np.array(tensors[name])).to(value.dtype) for name, value in expected.items()}
    model.load_state_dict(given, assign=assign)


@functools.lru_cache(maxsize=16)
def _kept_skeleton(name: str, settings: str) -> torch.nn.Module | None:
    """As ``_skeleton``, made once for each architecture and its settings (JSON): to be copied, never filled.

    A server builds version after version of one model while robots wait for the same interpreter.
    """
    member = architecture(name)
    return _skeleton(member, member.config(**json.loads(settings)))


def _skeleton(member: Architecture, config: Any) -> torch.nn.Module | None:
    """A model without weights: drawing random ones to replace them at once would take longer than loading them.

    None where it holds tensors that no artifact has, which must be computed, or where parameters share their storage,
    which replacing them would end.
    """
    with torch.device("meta"):
        model: Any = member.model(config)
    loaded = model.state_dict().keys()
    others = {name for name, _ in model.named_buffers()} - loaded
    if others or any(isinstance(value, torch.Tensor) for part in model.modules() for value in vars(part).values()):
        return None
    num_names = sum(1 for _ in model.named_parameters(remove_duplicate=False))
    return model if num_names == sum(1 for _ in model.parameters()) else None


def _known_settings(member: Architecture, settings: Mapping[str, Any]) -> dict[str, Any]:
    require_settings(f"{member.name} of this version", setting_types(member.config), settings)
    return dict(settings)
