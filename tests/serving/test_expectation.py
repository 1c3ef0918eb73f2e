"""What is expected of durations: never less than most of them were, and soon right again after a change."""

import numpy as np

from vla_dist.serving.expectation import Expectation


def test_nothing_is_expected_before_the_first_measurement():
    assert Expectation().most_s == 0.0


def test_the_first_measurement_is_the_mean_and_allows_three_times_as_much():
    expectation = Expectation()
    expectation.measure(0.1)
    assert (expectation.mean_s, expectation.most_s) == (0.1, 0.1 + 4 * 0.05)


def test_most_durations_are_shorter_than_what_is_reserved():
    expectation, rng = Expectation(), np.random.default_rng(0)
    shorter = []
    for duration_s in 0.005 * rng.lognormal(0, 0.3, 2000):
        shorter.append(duration_s <= expectation.most_s)
        expectation.measure(duration_s)
    assert np.mean(shorter[20:]) > 0.9
    assert expectation.most_s < 5 * expectation.mean_s, "so much is reserved that nothing would be computed"


def test_one_outlier_is_forgotten():
    expectation = Expectation()
    for duration_s in [0.005] * 50 + [2.0] + [0.005] * 50:
        expectation.measure(duration_s)
    assert expectation.most_s < 0.02
