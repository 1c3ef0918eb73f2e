"""Bounds that hold at every look, and what they decide."""

import numpy as np
import pytest

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.registry.sequential import CanaryRule, Tally, judge_canary, success_bounds


def test_bounds_hold_at_all_times_at_once() -> None:
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(200):
        rate = rng.uniform(0.1, 0.95)
        successes = np.cumsum(rng.random(200) < rate)
        looks = (
            success_bounds(Tally(successes=int(successes[n - 1]), trials=n), confidence=0.9) for n in range(1, 201)
        )
        missed += any(not low <= rate <= high for low, high in looks)
    assert missed / 200 < 0.1, "bounds that are looked at 200 times miss more often than promised"


def test_bounds_shrink_and_contain_the_rate() -> None:
    assert success_bounds(Tally(), confidence=0.95) == (0.0, 1.0)
    narrow, wide = (success_bounds(Tally(successes=8 * n, trials=10 * n), confidence=0.95) for n in (50, 1))
    assert wide[0] < narrow[0] < 0.8 < narrow[1] < wide[1]
    assert success_bounds(Tally(successes=9, trials=9), confidence=0.95)[1] == 1.0
    assert success_bounds(Tally(successes=0, trials=9), confidence=0.95)[0] == 0.0
    with pytest.raises(DataError, match="5 successes of 4 trials"):
        success_bounds(Tally(successes=5, trials=4), confidence=0.95)


def rollback_share(canary_rate: float, incumbent_rate: float, *, num_episodes: int) -> float:
    rng = np.random.default_rng(1)
    ended = 0
    for _ in range(100):
        canary, incumbent = rng.random(num_episodes) < canary_rate, rng.random(3 * num_episodes) < incumbent_rate
        for n in range(5, num_episodes + 1, 5):
            verdict = judge_canary(
                Tally(successes=int(canary[:n].sum()), trials=n),
                Tally(successes=int(incumbent[: 3 * n].sum()), trials=3 * n),
                CanaryRule(),
            )
            if verdict.decision == "rollback":
                ended += 1
                break
    return ended / 100


def test_a_worse_canary_is_rolled_back_and_an_equal_one_is_not() -> None:
    assert rollback_share(0.5, 0.9, num_episodes=100) > 0.95
    assert rollback_share(0.8, 0.8, num_episodes=200) <= 0.05


def test_promotion_needs_evidence() -> None:
    good = Tally(successes=190, trials=200)
    assert judge_canary(Tally(successes=10, trials=10), good, CanaryRule()).decision == "continue"
    assert judge_canary(good, Tally(successes=180, trials=200), CanaryRule()).decision == "promote"
    assert judge_canary(Tally(successes=27, trials=30), good, CanaryRule()).decision == "continue"
    with pytest.raises(ConfigError, match="margin"):
        CanaryRule(margin=-0.1)
