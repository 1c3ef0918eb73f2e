"""Intervals for success rates."""

import math
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
