import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_dist.replay.sum_tree import SumTree

weights = st.one_of(st.just(0.0), st.floats(1e-9, 1e9))
writes = st.lists(
    st.lists(st.tuples(st.integers(0, 5000), weights), min_size=1, max_size=30, unique_by=lambda write: write[0]),
    max_size=6,
)


@given(writes)
@settings(max_examples=40, deadline=None)
def test_it_holds_what_an_array_holds(history):
    tree, array = SumTree(), np.zeros(8192)
    for pairs in history:
        positions = np.array([position for position, _ in pairs])
        values = np.array([value for _, value in pairs])
        tree.write(positions, values)
        array[positions] = values
        np.testing.assert_allclose(tree.total, array.sum(), rtol=1e-12)
        np.testing.assert_array_equal(tree.weights(positions), values)
    if tree.total > 0:
        drawn = tree.draw(200, np.random.default_rng(len(history)))
        assert (array[drawn] > 0).all(), "what weighs nothing is never drawn"
        # One draw from each of 200 equal parts: how often each position comes is known but for the parts at its ends.
        expected = 200 * array / array.sum()
        counts = np.bincount(drawn, minlength=len(array))
        assert (counts >= np.floor(expected) - 1).all()
        assert (counts <= np.ceil(expected) + 1).all()


def test_of_equal_positions_the_last_counts():
    tree = SumTree()
    tree.write(np.array([3, 5, 3]), np.array([1.0, 2.0, 7.0]))
    assert tree.weights(np.array([3, 5])).tolist() == [7.0, 2.0]
    assert tree.total == 9.0


def test_sums_do_not_drift():
    tree, rng = SumTree(), np.random.default_rng(0)
    for _ in range(300):
        positions = rng.integers(0, 64, 20)
        tree.write(positions, rng.random(20) * 10.0 ** rng.integers(-6, 9, 20))
    tree.write(np.arange(64), np.full(64, 0.125))
    assert tree.total == 8.0


def test_growing_keeps_what_was_there():
    tree = SumTree()
    tree.write(np.array([0, 1023]), np.array([1.0, 2.0]))
    tree.write(np.array([1024]), np.array([4.0]))
    tree.write(np.array([1_000_000]), np.array([8.0]))
    assert tree.total == 15.0
    assert tree.weights(np.array([0, 1023, 1024, 1_000_000, 7])).tolist() == [1.0, 2.0, 4.0, 8.0, 0.0]
    assert set(tree.draw(15, np.random.default_rng(0)).tolist()) == {0, 1023, 1024, 1_000_000}


def test_cleared_it_weighs_nothing():
    tree = SumTree()
    tree.write(np.arange(10), np.ones(10))
    tree.clear()
    assert tree.total == 0.0
    tree.write(np.array([4]), np.array([2.0]))
    assert tree.draw(5, np.random.default_rng(0)).tolist() == [4] * 5


def test_writing_nothing_changes_nothing():
    tree = SumTree()
    tree.write(np.zeros(0, np.int64), np.zeros(0))
    assert tree.total == 0.0


def test_an_aim_beyond_the_last_weight_by_rounding_falls_on_it():
    class AlmostOne:
        def random(self, num):
            return np.full(num, 1.0 - 2.0**-53)

    tree = SumTree()
    tree.write(np.arange(7), np.full(7, 0.1))
    assert tree.draw(1000, AlmostOne()).max() == 6
