"""When a table asks its writers or its readers to wait; all numbers in environment steps.

The limiter keeps one number, the balance: since the table first held ``min_steps`` drawable steps, each inserted step
adds ``samples_per_insert`` to it and each sampled window subtracts 1.

For a FIFO table, which gives each step once, all inserted steps count; each acknowledged step subtracts 1, and steps
evicted before that count no more. With a ratio of 1 the balance is what waits in the queue.

    an insert waits   iff  drawable >= min_steps  and  balance > +error_buffer_steps
    a sample waits    iff  drawable <  min_steps  or   balance < -error_buffer_steps

Both can never wait at once: that would need balance > +e and balance < -e. So no setting of the three numbers and no
restored state can stop both sides; a call may overshoot the buffer by its own size, once. What remains refusable are
settings under which one side waits for ever, and those are refused here and in ``TableConfig``.
"""

import itertools
import math
import secrets
from dataclasses import dataclass

from vla_dist.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class LimiterConfig:
    """Min size and the ratio of sampling to inserting."""

    min_steps: int = 1
    """Steps of complete episodes that must be stored before anything is sampled."""
    samples_per_insert: float | None = None
    """Windows sampled for each inserted step, on average; None: neither side waits for the other."""
    error_buffer_steps: float = 1000.0
    """How far the balance may lean to either side before a side waits; ignored without a ratio."""

    def __post_init__(self) -> None:
        if self.min_steps < 1:
            raise ConfigError(f"min_steps {self.min_steps} must be at least 1: an empty table has nothing to sample")
        ratio = self.samples_per_insert
        if ratio is not None and not (math.isfinite(ratio) and ratio > 0):
            raise ConfigError(
                f"samples_per_insert {ratio} must be a positive number or None: at 0 or below inserts never allow a "
                "sample and the readers wait for ever"
            )
        if not (math.isfinite(self.error_buffer_steps) and self.error_buffer_steps >= 0):
            raise ConfigError(
                f"error_buffer_steps {self.error_buffer_steps} must be 0 or more: below 0 there is a balance at which "
                "readers and writers both wait, for ever"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LimiterState:
    """The limiter's numbers at one moment."""

    config: LimiterConfig
    """In force now, overrides included."""
    drawable_steps: int
    """Steps of complete episodes stored now."""
    balance: float
    """Sampling owed to (positive) or taken in advance of (negative) the inserts, in windows."""

    @property
    def inserts_wait(self) -> bool:
        return (
            self.config.samples_per_insert is not None
            and self.drawable_steps >= self.config.min_steps
            and self.balance > self.config.error_buffer_steps
        )

    @property
    def samples_wait(self) -> bool:
        if self.drawable_steps < self.config.min_steps:
            return True
        return self.config.samples_per_insert is not None and self.balance < -self.config.error_buffer_steps


class ChargeNumbers:
    """Names the charges of one client, so that one which comes again, because its answer was lost, counts once.

    Each charge must be answered, or given up, before the next is named.
    """

    def __init__(self) -> None:
        self._client = secrets.token_hex(8)
        self._numbers = itertools.count()

    def next(self) -> tuple[str, int]:
        """Arguments of the next charge: this client and a number."""
        return self._client, next(self._numbers)
