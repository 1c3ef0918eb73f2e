import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_dist.core.errors import DataError
from vla_dist.data.normalisation import RunningMoments


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=80, deadline=None)
def test_parts_merge_to_the_moments_of_the_whole(sizes, seed):
    rng = np.random.default_rng(seed)
    parts = [rng.normal(50.0, [0.5, 2.0, 30.0], (size, 3)) for size in sizes]
    whole = np.concatenate(parts)
    updated, merged = RunningMoments.empty(3), RunningMoments.empty(3)
    for part in parts:
        updated = updated.update(part)
        merged = merged.merge(RunningMoments.empty(3).update(part))
    for moments in (updated, merged):
        assert moments.count == len(whole)
        if len(whole):
            np.testing.assert_allclose(moments.mean, whole.mean(axis=0), rtol=1e-10)
            np.testing.assert_allclose(moments.std(floor=0.0), whole.std(axis=0), rtol=1e-8, atol=1e-10)


def test_large_offsets_keep_their_digits():
    values = 1e8 + np.array([[0.0], [1.0], [2.0], [3.0]])
    moments = RunningMoments.empty(1)
    for value in values:
        moments = moments.update(value[None])
    np.testing.assert_allclose(moments.std(), values.std(axis=0), rtol=1e-6)


def test_a_dimension_that_hardly_moves_is_not_scaled():
    values = np.stack([np.linspace(-1, 1, 100), np.linspace(0, 1e-4, 100)], axis=1)
    std = RunningMoments.empty(2).update(values).std(floor=1e-2)
    assert std[0] == pytest.approx(values[:, 0].std())
    assert std[1] == 1.0
    assert RunningMoments.empty(2).std().tolist() == [1.0, 1.0]


def test_arrays_bring_the_moments_back():
    moments = RunningMoments.empty(2).update(np.arange(6.0).reshape(3, 2))
    back = RunningMoments.from_arrays(moments.to_arrays())
    assert back.count == 3
    np.testing.assert_array_equal(back.mean, moments.mean)
    np.testing.assert_array_equal(back.sum_squares, moments.sum_squares)
    with pytest.raises(DataError, match="missing \\['count'\\]"):
        RunningMoments.from_arrays({"mean": moments.mean, "sum_squares": moments.sum_squares})


def test_values_that_would_spoil_the_moments_are_refused():
    moments = RunningMoments.empty(2)
    with pytest.raises(DataError, match="NaN or infinity"):
        moments.update(np.array([[0.0, np.nan]]))
    with pytest.raises(DataError, match=r"expected \(N, 2\)"):
        moments.update(np.zeros((4, 3)))
