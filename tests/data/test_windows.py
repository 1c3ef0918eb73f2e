import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_dist.data.windows import WindowPieces


def cut(newest, length, context_steps, future_steps, num_steps):
    """The steps of one window, None where padded, and its pieces as (segment, first, count), one step at a time."""
    steps = [
        step if 0 <= step < length else None for step in range(newest - context_steps + 1, newest + future_steps + 1)
    ]
    pieces = []
    for step in (step for step in steps if step is not None):
        segment, offset = divmod(step, num_steps)
        if pieces and pieces[-1][0] == segment:
            pieces[-1][2] += 1
        else:
            pieces.append([segment, offset, 1])
    return steps, pieces


@given(
    num_steps=st.integers(1, 7),
    context_steps=st.integers(1, 20),
    future_steps=st.sampled_from([0, 0, 1, 9]),
    places=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), min_size=1, max_size=12),
)
@settings(max_examples=200, deadline=None)
def test_windows_equal_a_step_by_step_copy(num_steps, context_steps, future_steps, places):
    newest = np.array([step for step, _ in places])
    lengths = newest + np.array([left for _, left in places])
    pieces = WindowPieces.around(
        newest // num_steps,
        newest % num_steps,
        context_steps=context_steps,
        num_steps=num_steps,
        future_steps=future_steps,
        episode_lengths=lengths,
    )
    expected = [
        cut(step, length, context_steps, future_steps, num_steps)
        for step, length in zip(newest.tolist(), lengths.tolist(), strict=True)
    ]
    found = list(
        zip(*(a.tolist() for a in (pieces.windows, pieces.segments, pieces.firsts, pieces.counts)), strict=True)
    )
    assert found == [(window, *piece) for window, (_, cuts) in enumerate(expected) for piece in cuts]
    # The steps of all pieces, arranged: each window with zeros where it is padded.
    joined = np.array([segment * num_steps + first + n for _, segment, first, count in found for n in range(count)])
    windows = pieces.arrange(joined)
    for window, (steps, _) in enumerate(expected):
        assert windows[window].tolist() == [step or 0 for step in steps]
        assert pieces.timesteps[window].tolist() == [step or 0 for step in steps]
        assert pieces.padding_mask[window].tolist() == [step is not None for step in steps]
        assert pieces.num_valid[window] == sum(step is not None for step in steps)


def test_indices_of_a_narrow_type_do_not_overflow():
    pieces = WindowPieces.around(
        np.array([2**31 // 100], np.int32), np.array([1], np.int32), context_steps=2, num_steps=1000
    )
    assert pieces.timesteps.tolist() == [[2**31 // 100 * 1000, 2**31 // 100 * 1000 + 1]]


def test_a_batch_of_no_windows_has_no_pieces():
    none = np.zeros(0, np.int64)
    pieces = WindowPieces.around(none, none, context_steps=4, num_steps=3)
    assert len(pieces.windows) == len(pieces.counts) == 0
    assert pieces.arrange(none).shape == (0, 4)
