import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_dist.core.errors import DataError
from vla_dist.data.returns import returns_to_go


@given(length=st.integers(1, 30), num_steps=st.integers(1, 8), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=80, deadline=None)
def test_segments_with_their_tails_equal_the_whole_episode(length, num_steps, seed):
    rewards = np.random.default_rng(seed).normal(size=length)
    whole = np.array([rewards[step:].sum() for step in range(length)])
    num_segments = -(-length // num_steps)
    rows = np.full((num_segments, num_steps), 99.0)  # what padding holds must not matter
    rows.reshape(-1)[:length] = rewards
    lengths = np.minimum(num_steps, length - num_steps * np.arange(num_segments))
    tails = np.array([rewards[(i + 1) * num_steps :].sum() for i in range(num_segments)])
    result = returns_to_go(rows, lengths=lengths, tail_returns=tails)
    np.testing.assert_allclose(result.reshape(-1)[:length], whole, rtol=1e-12, atol=1e-12)
    assert not result.reshape(-1)[length:].any()
    np.testing.assert_allclose(returns_to_go(rewards), whole, rtol=1e-12, atol=1e-12)


def test_small_rewards_survive_a_long_episode():
    rewards = np.full(100_000, 0.1, np.float32)
    rewards[-1] = 1e6
    assert returns_to_go(rewards)[0] == pytest.approx(1e6 + 99_999 * float(np.float32(0.1)), rel=1e-12)


@pytest.mark.parametrize("length", [-1, 3])
def test_a_length_outside_the_row_is_refused(length):
    with pytest.raises(DataError, match=r"must be within 0\.\.2"):
        returns_to_go(np.zeros((1, 2)), lengths=np.array([length]))
