"""Batches put together from windows that came at different times or from different servers."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from vla_dist.core.types import Array, Batch


def replace_windows(batch: Batch, at: Array, fresh: Batch) -> Batch:
    """``batch`` with the windows of ``fresh`` in the places ``at``."""

    def merged(old: Any, new: Any) -> Any:
        if old is None:
            return None
        if isinstance(old, dict):
            return {name: merged(frames, new[name]) for name, frames in old.items()}
        if isinstance(old, tuple):
            values = list(old)
            for place, value in zip(at.tolist(), new, strict=True):
                values[place] = value
            return tuple(values)
        copy = old.copy()
        copy[at] = new
        return copy

    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return Batch(**{name: merged(value, getattr(fresh, name)) for name, value in fields.items()})


def scale_weights(batch: Batch) -> Batch:
    """``batch`` with weights of which the largest is 1; done last, as its windows may come from several draws."""
    if batch.weights is None:
        return batch
    return dataclasses.replace(batch, weights=(batch.weights / batch.weights.max()).astype(np.float32))


def join_windows(parts: Sequence[tuple[Batch, Array]]) -> Batch:
    """One batch of the windows of several, each part as a batch and (B,) bool, which of its windows to take."""
    taken = [(batch, None if keep.all() else np.flatnonzero(keep)) for batch, keep in parts]

    def joined(values: list[Any]) -> Any:
        if values[0] is None:
            return None
        if isinstance(values[0], dict):
            return {name: joined([value[name] for value in values]) for name in values[0]}
        chosen = [value if at is None else _at(value, at) for value, (_, at) in zip(values, taken, strict=True)]
        if isinstance(values[0], tuple):
            return tuple(item for value in chosen for item in value)
        return chosen[0] if len(chosen) == 1 else np.concatenate(chosen)

    names = [field.name for field in dataclasses.fields(Batch)]
    return Batch(**{name: joined([getattr(batch, name) for batch, _ in taken]) for name in names})


def _at(value: Any, places: Array) -> Any:
    return tuple(value[place] for place in places.tolist()) if isinstance(value, tuple) else value[places]
