"""Memories travel as named leaves, and come back without their classes."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from vla_dist.core.errors import DataError
from vla_dist.core.state_tree import rebuild_state, state_leaves


@dataclass(frozen=True)
class Inner:
    rows: np.ndarray
    count: int = 0


@dataclass(frozen=True)
class Outer:
    inner: Inner
    subgoal: str | None = None
    keys: np.ndarray | None = field(default=None, init=False)


def test_leaves_are_named_by_their_place_and_build_the_state_again():
    state = Outer(inner=Inner(rows=np.arange(6.0).reshape(2, 3), count=4))
    leaves = dict(state_leaves(state))
    assert list(leaves) == [".inner.rows", ".inner.count", ".subgoal", ".keys"]
    again = rebuild_state(Outer(inner=Inner(rows=np.zeros((2, 3)))), leaves)
    np.testing.assert_array_equal(again.inner.rows, state.inner.rows)
    assert (again.inner.count, again.subgoal, again.keys) == (4, None, None)


def test_a_leaf_of_another_kind_is_refused_by_its_place():
    with pytest.raises(DataError, match=r"str at \.subgoal"):
        list(state_leaves(Outer(inner=Inner(rows=np.zeros(1)), subgoal="open")))
    with pytest.raises(DataError, match=r"ndarray at \.inner\.rows"):
        list(state_leaves(Inner(rows=np.array(["words"])), ".inner"))
