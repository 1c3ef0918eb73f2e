"""A policy's state as columns of fixed shape, as RLlib stacks the states of its environments.

Dimensions: N rows that a leaf has at most.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_dist.core.errors import ConfigError
from vla_dist.core.protocols import Policy
from vla_dist.core.specs import EnvSpec
from vla_dist.core.state_tree import rebuild_state, state_leaves
from vla_dist.core.types import Array, Observation

_COUNT = "#"
"""Ends the name of the column that says how many rows of another one are there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Column:
    path: str
    shape: tuple[int, ...]
    dtype: Any
    is_number: bool
    """A plain number of the state, kept as (1,)."""
    is_counted: bool
    """A leaf that is None, or has fewer rows, before the first step."""

    @property
    def name(self) -> str:
        return self.path.lstrip(".").replace(".", "_")


class StateColumns:
    """Packs states of one policy. What a state holds only to save time is left out and computed again."""

    def __init__(self, policy: Policy[Any]) -> None:
        """Acts twice, on zeros, to see what a state becomes.

        Raises:
            ConfigError: a state that grows with the episode.
        """
        self._template = policy.initial_state()
        states = [self._template]
        for _ in range(2):
            _, (after,) = policy.act([_zeros(policy.spec)], [states[-1]])
            states.append(after)
        before, first, second = (dict(state_leaves(state)) for state in states)
        self._columns = [
            _column(path, before[path], leaf, second[path]) for path, leaf in first.items() if path in before
        ]
        self._columns = [column for column in self._columns if column.shape or column.is_number]

    def pack(self, state: Any) -> dict[str, Array]:
        """name -> an array of the same shape for every state."""
        leaves = dict(state_leaves(state))
        packed: dict[str, Array] = {}
        for column in self._columns:
            leaf = leaves[column.path]
            values = np.zeros(column.shape, column.dtype)
            if column.is_number:
                values[0] = leaf
            elif column.is_counted:
                num_rows = 0 if leaf is None else len(leaf)
                packed[column.name + _COUNT] = np.array([num_rows], np.int64)
                if num_rows:
                    values[:num_rows] = leaf
            else:
                values = np.array(leaf, column.dtype)
            packed[column.name] = values
        return packed

    def unpack(self, columns: Mapping[str, Array]) -> Any:
        """Inverse of ``pack``; arrays may have come back as another type of number."""
        leaves: dict[str, Any] = {}
        for column in self._columns:
            values = np.array(columns[column.name]).astype(column.dtype)
            if column.is_number:
                leaves[column.path] = values[0].item()
                continue
            if column.is_counted:
                num_rows = int(columns[column.name + _COUNT][0])
                if not num_rows and column.path not in self._counted_from_start:
                    continue
                values = values[:num_rows]
            values.flags.writeable = False
            leaves[column.path] = values
        return rebuild_state(self._template, leaves)

    @property
    def _counted_from_start(self) -> set[str]:
        """Leaves that are empty arrays, not None, before the first step."""
        return {path for path, leaf in state_leaves(self._template) if leaf is not None}


def _column(path: str, before: Any, first: Any, second: Any) -> _Column:
    if isinstance(first, np.ndarray):
        grows = first.shape != np.shape(second)
        if grows or (before is not None and before.shape[1:] != first.shape[1:]):
            raise ConfigError(
                f"the policy's memory {path} grows from {np.shape(before)} to {first.shape} to {np.shape(second)}; "
                "RLlib needs one of fixed size: execute chunks by open_loop or real_time"
            )
        is_counted = before is None or before.shape != first.shape
        return _Column(path=path, shape=first.shape, dtype=first.dtype, is_number=False, is_counted=is_counted)
    if first is None:
        return _Column(path=path, shape=(), dtype=np.float32, is_number=False, is_counted=False)
    dtype = np.float32 if isinstance(first, float) else np.int64
    return _Column(path=path, shape=(1,), dtype=dtype, is_number=True, is_counted=False)


def _zeros(spec: EnvSpec) -> Observation:
    return Observation(
        proprio=np.zeros(spec.proprio_dim, np.float32),
        images={camera.name: np.zeros((camera.height, camera.width, 3), np.uint8) for camera in spec.cameras},
    )
