import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_dist.core.errors import DataError
from vla_dist.data.windows import WindowIndex, segments_per_window


@pytest.mark.parametrize("num_steps", [1, 2, 3, 8])
@pytest.mark.parametrize("context_steps", [1, 2, 3, 7, 8, 9, 17])
def test_segments_per_window_is_the_most_that_occurs(num_steps, context_steps):
    touched = {
        len({step // num_steps for step in range(start, start + context_steps)}) for start in range(3 * num_steps)
    }
    assert segments_per_window(context_steps, num_steps) == max(touched)


@given(
    num_steps=st.integers(1, 6),
    context_steps=st.integers(1, 14),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=100, deadline=None)
def test_windows_equal_a_step_by_step_copy(num_steps, context_steps, lengths, seed):
    rng = np.random.default_rng(seed)
    episodes = [rng.normal(size=(length, 2)) for length in lengths]
    # The segments of all episodes lie as rows in a random order.
    places = [(e, i) for e, length in enumerate(lengths) for i in range(-(-length // num_steps))]
    order = rng.permutation(len(places))
    row_of = {places[place]: row for row, place in enumerate(order)}
    rows = rng.normal(size=(len(places), num_steps, 2))
    for (e, i), row in row_of.items():
        piece = episodes[e][i * num_steps : (i + 1) * num_steps]
        rows[row, : len(piece)] = piece

    span = segments_per_window(context_steps, num_steps)
    ends = [(e, step) for e, length in enumerate(lengths) for step in range(length)]
    window_rows = np.full((len(ends), span), -1)
    for b, (e, step) in enumerate(ends):
        first = max(0, step - context_steps + 1) // num_steps
        for segment in range(first, step // num_steps + 1):
            window_rows[b, span - 1 - (step // num_steps - segment)] = row_of[e, segment]
    index = WindowIndex.ending_at(
        window_rows=window_rows,
        segment_indices=np.array([step // num_steps for _, step in ends], np.uint32),
        offsets=np.array([step % num_steps for _, step in ends], np.uint32),
        context_steps=context_steps,
        num_steps=num_steps,
    )
    gathered = index.gather(rows)

    expected = np.zeros((len(ends), context_steps, 2))
    mask = np.zeros((len(ends), context_steps), bool)
    timesteps = np.zeros((len(ends), context_steps), np.int64)
    for b, (e, end) in enumerate(ends):
        for k in range(context_steps):
            step = end - (context_steps - 1 - k)
            if step >= 0:
                expected[b, k], mask[b, k], timesteps[b, k] = episodes[e][step], True, step
    np.testing.assert_array_equal(gathered, expected)
    np.testing.assert_array_equal(index.padding_mask, mask)
    np.testing.assert_array_equal(index.timesteps, timesteps)


def test_a_window_that_needs_a_missing_row_is_refused():
    arguments = {"segment_indices": np.array([1]), "offsets": np.array([0]), "context_steps": 3, "num_steps": 2}
    with pytest.raises(DataError, match="was not given"):
        WindowIndex.ending_at(window_rows=np.array([[-1, 5]]), **arguments)
    with pytest.raises(DataError, match="more than the 1 segments given"):
        WindowIndex.ending_at(window_rows=np.array([[5]]), **arguments)


def test_gathering_leaves_the_rows_alone():
    rows = np.ones((1, 2, 3))
    index = WindowIndex.ending_at(
        window_rows=np.array([[0]]),
        segment_indices=np.array([0]),
        offsets=np.array([0]),
        context_steps=1,
        num_steps=2,
    )
    index.gather(rows)[:] = 7
    assert (rows == 1).all()
