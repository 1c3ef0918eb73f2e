import pytest

from vla_dist.core.errors import DataError
from vla_dist.evaluation.statistics import success_rate


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Published Wilson 95 % intervals (Newcombe 1998, Stat. Med. 17, 857-872, table I, method 3).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_intervals_equal_the_published_ones(successes, trials, low, high):
    rate = success_rate(successes, trials)
    assert rate.low == pytest.approx(low, abs=5e-5)
    assert rate.high == pytest.approx(high, abs=5e-5)
    assert rate.mean == successes / trials


def test_no_failure_is_not_certainty():
    rate = success_rate(10, 10)
    assert rate.high == 1.0
    assert rate.low < 0.75


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (3, 2), (-1, 5)])
def test_impossible_counts_are_refused(successes, trials):
    with pytest.raises(DataError, match="trials"):
        success_rate(successes, trials)
