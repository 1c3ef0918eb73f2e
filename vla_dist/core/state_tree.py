"""A policy's memory as named leaves and back, so that it can travel without its classes.

A state is a tree of dataclasses with arrays, numbers and None as leaves. The shape of the tree comes from
``policy.initial_state()``, never from what travels.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np

from vla_dist.core.errors import DataError
from vla_dist.core.types import Array

_PLAIN = (bool, int, float)


def state_leaves(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of every array, number and None. Raises DataError at a leaf of another kind."""
    if dataclasses.is_dataclass(state):
        for field in dataclasses.fields(state):
            yield from state_leaves(getattr(state, field.name), f"{path}.{field.name}")
    elif state is None or isinstance(state, _PLAIN) or _is_numeric(state):
        yield path, state
    else:
        raise DataError(f"the policy's state has {type(state).__name__} at {path}, expected arrays and numbers only")


def _is_numeric(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray) and cast(Array, leaf).dtype.kind in "fiub"


def rebuild_state(template: Any, leaves: Mapping[str, Any], path: str = "") -> Any:
    """The state with these leaves.

    Args:
        template: the policy's initial state.
        leaves: by path; what is unknown at the start and only derived later (keys of attention) is left out, so that
            the policy computes it again.
    """
    if dataclasses.is_dataclass(template) and not isinstance(template, type):
        fields = [field.name for field in dataclasses.fields(template) if field.init]
        return dataclasses.replace(
            template, **{name: rebuild_state(getattr(template, name), leaves, f"{path}.{name}") for name in fields}
        )
    return leaves.get(path)
