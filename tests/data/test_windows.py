import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_dist.data.windows import WindowPieces


def cut(end, context_steps, num_steps):
    """The steps of one window, and its pieces as (segment, first, count), one step at a time."""
    steps = [step for step in range(end - context_steps + 1, end + 1) if step >= 0]
    pieces = []
    for step in steps:
        segment, offset = divmod(step, num_steps)
        if pieces and pieces[-1][0] == segment:
            pieces[-1][2] += 1
        else:
            pieces.append([segment, offset, 1])
    return steps, pieces


@given(
    num_steps=st.integers(1, 7),
    context_steps=st.integers(1, 20),
    ends=st.lists(st.integers(0, 40), min_size=1, max_size=12),
)
@settings(max_examples=150, deadline=None)
def test_windows_equal_a_step_by_step_copy(num_steps, context_steps, ends):
    ends = np.array(ends)
    pieces = WindowPieces.ending_at(
        ends // num_steps, ends % num_steps, context_steps=context_steps, num_steps=num_steps
    )
    found = list(
        zip(*(a.tolist() for a in (pieces.windows, pieces.segments, pieces.firsts, pieces.counts)), strict=True)
    )
    expected = [
        (window, *piece) for window, end in enumerate(ends.tolist()) for piece in cut(end, context_steps, num_steps)[1]
    ]
    assert found == expected
    # The steps of all pieces behind one zero, then taken by index: each window, right-aligned.
    joined = np.array(
        [0, *(segment * num_steps + first + n for _, segment, first, count in found for n in range(count))]
    )
    windows = joined[pieces.step_index()]
    for window, end in enumerate(ends.tolist()):
        steps, _ = cut(end, context_steps, num_steps)
        padding = context_steps - len(steps)
        assert windows[window].tolist() == [0] * padding + steps
        assert pieces.timesteps[window].tolist() == [0] * padding + steps
        assert pieces.padding_mask[window].tolist() == [False] * padding + [True] * len(steps)
        assert pieces.num_valid[window] == len(steps)


def test_indices_of_a_narrow_type_do_not_overflow():
    pieces = WindowPieces.ending_at(
        np.array([2**31 // 100], np.int32), np.array([1], np.int32), context_steps=2, num_steps=1000
    )
    assert pieces.timesteps.tolist() == [[2**31 // 100 * 1000, 2**31 // 100 * 1000 + 1]]


def test_a_batch_of_no_windows_has_no_pieces():
    none = np.zeros(0, np.int64)
    pieces = WindowPieces.ending_at(none, none, context_steps=4, num_steps=3)
    assert len(pieces.windows) == len(pieces.counts) == 0
    assert pieces.step_index().shape == (0, 4)
