"""Intervals for success rates, and for the difference of two on the same episodes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from vla_dist.core.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class SuccessRate:
    """Successes out of trials with a Wilson score interval."""

    successes: int
    trials: int
    low: float
    high: float

    @property
    def mean(self) -> float:
        return self.successes / self.trials


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """How much more often the second of two succeeded, each trial being one episode that both were given."""

    both: int
    only_first: int
    only_second: int
    neither: int
    low: float
    """Of the interval of the difference, -1..1."""
    high: float
    p_value: float
    """Of McNemar's exact test: the chance of so lopsided a split of the trials that only one of them passed, were
    both equally good."""

    @property
    def trials(self) -> int:
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def mean(self) -> float:
        """Success rate of the second less that of the first."""
        return (self.only_second - self.only_first) / self.trials


def success_rate(successes: int, trials: int, *, confidence: float = 0.95) -> SuccessRate:
    """Wilson score interval of a binomial proportion.

    Stays within [0, 1] and keeps its coverage near 0 and 1, where the normal approximation does not.

    Raises:
        DataError: no trials, or more successes than trials.

    Source: Wilson 1927, JASA 22(158), 209-212, https://doi.org/10.1080/01621459.1927.10502953.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise DataError(f"{successes} successes of {trials} trials; expected 0 <= successes <= trials and trials >= 1")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / trials
    scale = 1 + z * z / trials
    centre = (p + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return SuccessRate(successes=successes, trials=trials, low=low, high=high)


def paired_difference(first: Sequence[bool], second: Sequence[bool], *, confidence: float = 0.95) -> PairedDifference:
    """Of two lists of successes, trial by trial.

    The interval squares and adds the distances to the ends of the two Wilson intervals, less what the correlation of
    the pairs takes off.

    Raises:
        DataError: no trials, or not as many of the one as of the other.

    Source: Newcombe 1998, Statistics in Medicine 17, 2635-2650, method 10; McNemar 1947, Psychometrika 12, 153-157,
    in its exact form.
    """
    if len(first) != len(second) or not first:
        raise DataError(f"{len(first)} trials of the first and {len(second)} of the second; expected as many, and some")
    pairs = list(zip(map(bool, first), map(bool, second), strict=True))
    both, neither = pairs.count((True, True)), pairs.count((False, False))
    only_first, only_second = pairs.count((True, False)), pairs.count((False, True))
    one = success_rate(both + only_first, len(pairs), confidence=confidence)
    two = success_rate(both + only_second, len(pairs), confidence=confidence)
    difference = (only_second - only_first) / len(pairs)
    phi = _correlation(both, only_first, only_second, neither)
    down = _side(two.mean - two.low, one.high - one.mean, phi)
    up = _side(two.high - two.mean, one.mean - one.low, phi)
    return PairedDifference(
        both=both,
        only_first=only_first,
        only_second=only_second,
        neither=neither,
        low=max(-1.0, difference - down),
        high=min(1.0, difference + up),
        p_value=_mcnemar(only_first, only_second),
    )


def _correlation(both: int, only_first: int, only_second: int, neither: int) -> float:
    """Phi of the fourfold table, a positive one with Newcombe's continuity correction."""
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    if not margins:
        return 0.0
    product = both * neither - only_first * only_second
    if product > 0:
        product = max(product - (both + only_first + only_second + neither) / 2, 0.0)
    return product / math.sqrt(margins)


def _side(mine: float, other: float, phi: float) -> float:
    return math.sqrt(max(0.0, mine * mine - 2 * phi * mine * other + other * other))


def _mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided, from the binomial distribution of the discordant pairs."""
    discordant = only_first + only_second
    fewer = min(only_first, only_second)
    tail = sum(math.comb(discordant, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**discordant)
