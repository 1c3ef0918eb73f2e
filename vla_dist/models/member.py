"""What the learner, the registry and the runs may ask of a member of the zoo; everything else is the member's own."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from vla_dist.core.errors import DataError
from vla_dist.models.batch import TrainBatch

_DTYPES = {"timesteps": torch.int64, "padding_mask": torch.bool, "chunk_mask": torch.bool}
"""Of the fields of a batch that are no floats."""


class PolicyModelConfig(Protocol):
    """The settings that each member's config has, whatever else it has."""

    @property
    def state_dim(self) -> int:
        """P; 0 where proprio is not used."""
        ...

    @property
    def action_dim(self) -> int:
        """A; choices where the head is ``discrete``."""
        ...

    @property
    def context_steps(self) -> int:
        """K, steps of a training window and observations that rebuild a policy's state."""
        ...

    @property
    def horizon(self) -> int:
        """H, actions predicted at once; 1 where the member does not chunk."""
        ...

    @property
    def goal_dim(self) -> int:
        """G of the frozen sentence embedding; 0: none wanted."""
        ...

    @property
    def cameras(self) -> Sequence[str] | None:
        """Names of the views it looks at."""
        ...

    @property
    def head(self) -> str:
        """``discrete`` for one-hot actions, else the continuous head's name."""
        ...


class PolicyModel(Protocol):
    """A ``transformers.PreTrainedModel`` that can be trained on any replay and published to any robot."""

    @property
    def config(self) -> PolicyModelConfig: ...

    def loss(self, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """What to minimise, and detached scalars on the model's device.

        A window counts as much as its entry in ``batch.weights`` says, and a step as its one in ``batch.step_weights``,
        where there are such.
        """
        ...

    def loss_count(self, batch: TrainBatch) -> Tensor:
        """() float32: how many terms ``loss`` is the mean of, so that means of parts add up to that of the whole."""
        ...

    def set_normaliser(
        self,
        *,
        proprio_mean: Tensor,
        proprio_std: Tensor,
        goal_mean: Tensor | None = None,
        goal_std: Tensor | None = None,
    ) -> None:
        """Take over the data's scales, (state_dim,) and (goal_dim,), as buffers that travel with the weights."""
        ...


def as_module(model: PolicyModel) -> nn.Module:
    """The same object as what it also is: a protocol cannot inherit from a class."""
    return cast(nn.Module, model)


def require_batch(batch: TrainBatch, config: PolicyModelConfig) -> None:
    """Compare a batch's shapes and types with what a model of this config reads, without waiting for its device.

    Raises:
        DataError: naming each field that is missing or has another shape or type.
    """
    num, steps, size = len(batch.padding_mask), config.context_steps, config.action_dim
    expected: dict[str, tuple[int, ...]] = {
        "actions": (num, steps, size),
        "target_actions": (num, steps, size),
        "target_chunks": (num, config.horizon, size),
        "chunk_mask": (num, config.horizon),
        "returns_to_go": (num, steps),
        "timesteps": (num, steps),
        "padding_mask": (num, steps),
    }
    if config.state_dim:
        expected["states"] = (num, steps, config.state_dim)
    if config.goal_dim:
        expected["goals"] = (num, config.goal_dim)
    given = {name: getattr(batch, name) for name in expected}
    wrong = [
        f"{name} {'missing' if given[name] is None else tuple(given[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if given[name] is None or given[name].shape != shape
    ]
    wrong += [
        f"{name} of {value.dtype}, expected {_DTYPES.get(name, 'floats')}"
        for name, value in given.items()
        if value is not None and not _has_kind(value, name)
    ]
    for camera in config.cameras or ():
        frames = batch.images.get(camera)
        if frames is None or frames.ndim != 5 or frames.shape[:3] != (num, steps, 3):
            shape = "missing" if frames is None else tuple(frames.shape)
            wrong.append(f"camera {camera!r} {shape}, expected ({num}, {steps}, 3, height, width)")
        elif frames.dtype != torch.uint8 and not frames.is_floating_point():
            wrong.append(f"camera {camera!r} of {frames.dtype}, expected uint8, or floats within [0, 1]")
    if wrong:
        raise DataError(f"the batch does not fit the model: {'; '.join(wrong)}. Was it collated for another config?")


def _has_kind(value: Tensor, name: str) -> bool:
    return value.dtype == _DTYPES[name] if name in _DTYPES else value.is_floating_point()


def masked_mean(terms: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of the terms (B, ...) at the True places of ``mask``, each times its weight, (B,) or (B, K); 0 of none.

    What stands elsewhere may be anything, NaN included.
    """
    kept = torch.where(mask, terms, 0.0)
    if weights is not None:
        kept = kept * weights.view(*weights.shape, *[1] * (terms.ndim - weights.ndim))
    return kept.sum() / mask.sum().clamp(min=1)


def own_settings(config: Any) -> dict[str, Any]:
    """What a member's config adds to the fields of every transformers config, as plain JSON: builds an equal model."""
    return {name: getattr(config, name) for name in setting_types(type(config))}


def setting_types(config: type[Any]) -> dict[str, Any]:
    """name -> annotated type, of those settings."""
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return {field.name: field.type for field in dataclasses.fields(config) if field.name not in common}


def setting_changes(config: Any, earlier: Mapping[str, Any]) -> list[str]:
    """``name old -> new`` of each setting in which a config differs from one saved by ``own_settings``.

    A setting that an older version of this package did not know had its default value.
    """
    now = own_settings(config)
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    before = {name: earlier.get(name, defaults[name]) for name in now}
    changed = [f"{name} {before[name]!r} -> {now[name]!r}" for name in now if before[name] != now[name]]
    return changed + [f"{name} {earlier[name]!r} -> unknown" for name in earlier if name not in now]
