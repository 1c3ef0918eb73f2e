"""Canaries judged while their episodes come in: bounds that hold at every look, however often one looks."""

import math
from dataclasses import dataclass
from typing import Literal

from vla_dist.core.errors import ConfigError, DataError

Decision = Literal["continue", "promote", "rollback"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Episodes of one version since its canary began."""

    successes: int = 0
    trials: int = 0

    @property
    def mean(self) -> float:
        return self.successes / max(1, self.trials)


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryRule:
    """When a canary is good enough, and when it is worse."""

    margin: float = 0.05
    """Share of successes that a canary may be short of the incumbent and still be promoted."""
    confidence: float = 0.95
    """1 - the chance that a canary that is as good as the incumbent is ever rolled back."""
    min_episodes: int = 30
    """Of each, before a promotion."""

    def __post_init__(self) -> None:
        if not (0 <= self.margin < 1 and 0.5 <= self.confidence < 1 and self.min_episodes >= 1):
            raise ConfigError(
                f"margin {self.margin} must be within [0, 1), confidence {self.confidence} within [0.5, 1) and "
                f"min_episodes {self.min_episodes} at least 1"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the episodes so far say."""

    decision: Decision
    reason: str
    """One sentence with the numbers."""


def judge_canary(canary: Tally, incumbent: Tally, rule: CanaryRule) -> Verdict:
    """Promote, roll back, or wait for more episodes.

    Rolled back where the canary's upper bound is below the incumbent's lower bound; may be promoted where its lower
    bound is no worse than the incumbent's rate minus the margin. Both bounds hold together at ``confidence``, at all
    times at once, so that judging after every episode is no cheating.
    """
    each = 1 - (1 - rule.confidence) / 2
    low, high = success_bounds(canary, confidence=each)
    other_low, other_high = success_bounds(incumbent, confidence=each)
    numbers = (
        f"canary {canary.successes}/{canary.trials} [{low:.2f}, {high:.2f}], "
        f"incumbent {incumbent.successes}/{incumbent.trials} [{other_low:.2f}, {other_high:.2f}]"
    )
    if high < other_low:
        return Verdict(decision="rollback", reason=f"the canary is worse: {numbers}")
    fewest = min(canary.trials, incumbent.trials)
    if fewest < rule.min_episodes:
        return Verdict(decision="continue", reason=f"{fewest} of {rule.min_episodes} episodes each: {numbers}")
    if low >= incumbent.mean - rule.margin:
        return Verdict(decision="promote", reason=f"no worse by more than {rule.margin:g}: {numbers}")
    return Verdict(decision="continue", reason=f"not certain yet: {numbers}")


def success_bounds(tally: Tally, *, confidence: float) -> tuple[float, float]:
    """Lower and upper bound of a success rate, valid at all sample sizes at once.

    The set of rates p whose mixture likelihood ratio B(s+1, n-s+1) / (p^s (1-p)^(n-s)) is below 1 / alpha; the ratio
    is a martingale under the true rate, so by Ville's inequality it passes 1 / alpha ever with chance alpha at most.

    Raises:
        DataError: more successes than trials.

    Source: Robbins 1970, Annals of Mathematical Statistics 41(5), 1397-1409, with a uniform mixture.
    """
    s, n = tally.successes, tally.trials
    if not 0 <= s <= n:
        raise DataError(f"{s} successes of {n} trials; expected 0 <= successes <= trials")
    if n == 0:
        return 0.0, 1.0
    limit = -math.log(1 - confidence)
    log_mixture = math.lgamma(s + 1) + math.lgamma(n - s + 1) - math.lgamma(n + 2)

    def is_inside(p: float) -> bool:
        successes = s * math.log(p) if s else 0.0
        failures = (n - s) * math.log1p(-p) if n > s else 0.0
        return log_mixture - successes - failures < limit

    mode = s / n
    low = 0.0 if s == 0 else _edge(is_inside, outside=1e-12, inside=mode if s < n else 1 - 1e-12)
    high = 1.0 if s == n else _edge(is_inside, outside=1 - 1e-12, inside=mode if s else 1e-12)
    return low, high


def _edge(is_inside, *, outside: float, inside: float) -> float:  # type: ignore[no-untyped-def]
    """Where a set that is an interval ends, by bisection."""
    for _ in range(60):
        middle = (outside + inside) / 2
        if is_inside(middle):
            inside = middle
        else:
            outside = middle
    return inside
