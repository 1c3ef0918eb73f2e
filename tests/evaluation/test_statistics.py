import numpy as np
import pytest

from vla_dist.core.errors import DataError
from vla_dist.evaluation.statistics import paired_difference, success_rate


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


def pairs(both, only_first, only_second, neither):
    first = [True] * (both + only_first) + [False] * (only_second + neither)
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    return first, second


def test_a_paired_difference_equals_the_published_one():
    # Fagerland, Lydersen and Laake 2014, Stat. Med. 33, 2850-2875: 21 patients before and after a transplantation.
    found = paired_difference(*pairs(1, 7, 1, 12))
    assert found.mean == pytest.approx(-6 / 21)
    assert (found.low, found.high) == (pytest.approx(-0.507, abs=1e-3), pytest.approx(-0.026, abs=1e-3))
    assert found.p_value == pytest.approx(0.0703, abs=1e-4)
    turned = paired_difference(*pairs(1, 1, 7, 12))
    assert (turned.low, turned.high) == (pytest.approx(-found.high), pytest.approx(-found.low))


def test_what_pairs_share_takes_luck_off_the_difference():
    shared = paired_difference(*pairs(80, 0, 10, 10))
    alone = paired_difference(*pairs(70, 10, 20, 0))
    assert shared.mean == pytest.approx(alone.mean)
    assert shared.low > 0 > alone.low
    assert shared.p_value < 0.01 < alone.p_value


def test_the_interval_of_a_difference_covers_it_as_often_as_it_says():
    rng = np.random.default_rng(0)
    chances = np.array([0.5, 0.1, 0.2, 0.2])
    covered = 0
    for counts in rng.multinomial(60, chances, size=400):
        found = paired_difference(*pairs(*counts.tolist()))
        covered += found.low <= 0.1 <= found.high
    assert 0.92 <= covered / 400 <= 0.99


def test_equal_versions_are_not_told_apart():
    same = paired_difference(*pairs(10, 0, 0, 5))
    assert (same.mean, same.p_value) == (0.0, 1.0)
    assert same.low < 0 < same.high


def test_unequal_numbers_of_trials_are_refused():
    with pytest.raises(DataError, match="as many"):
        paired_difference([True], [True, False])
    with pytest.raises(DataError, match="some"):
        paired_difference([], [])
