"""Whether a policy keeps up with a robot's control rate."""

import math
from dataclasses import dataclass

from vla_dist.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """For one control rate and one network."""

    control_hz: float
    network_ms: float
    """Round trip."""
    synchronous_hz: float
    """Highest rate at which the robot can wait for each answer: 1 / (p99 + network)."""
    keeps_up_synchronously: bool
    delay_steps: int
    """d, control steps that go by while an answer is under way: ceil((p99 + network) x control_hz)."""
    horizon: int
    """H."""
    execute_steps: tuple[int, int] | None
    """Least and most steps s of a chunk to execute before the next one takes over, d <= s <= H - d; None: there is no
    such s."""

    @property
    def sentence(self) -> str:
        """For a person."""
        rate = f"{self.control_hz:g} Hz"
        if self.keeps_up_synchronously:
            return f"keeps up with {rate}: waits for each action, up to {self.synchronous_hz:.1f} Hz"
        if self.execute_steps is not None:
            low, high = self.execute_steps
            return (
                f"keeps up with {rate} by chunks: an answer takes {self.delay_steps} steps, execute {low} to {high} of "
                f"{self.horizon}"
            )
        return (
            f"too slow for {rate}: {self.synchronous_hz:.1f} Hz when waiting, and {self.horizon} action(s) at once do "
            f"not cover twice the {self.delay_steps} steps that an answer takes"
        )


def judge(*, p99_ms: float, horizon: int, control_hz: float, network_ms: float = 0.0) -> Verdict:
    """Source of the inequality: Black et al. 2025, "Real-Time Execution of Action Chunking Flow Policies", section 3.

    Raises:
        ConfigError: a rate or time that is not positive.
    """
    if not (control_hz > 0 and p99_ms > 0 and network_ms >= 0 and horizon >= 1):
        raise ConfigError(
            f"control rate {control_hz} Hz and latency {p99_ms} ms must be positive, network {network_ms} ms not "
            f"negative, horizon {horizon} at least 1"
        )
    answer_s = (p99_ms + network_ms) / 1000
    # Rounding must not turn an answer of exactly d steps into one of d + 1.
    delay = math.ceil(answer_s * control_hz - 1e-9)
    return Verdict(
        control_hz=control_hz,
        network_ms=network_ms,
        synchronous_hz=1 / answer_s,
        keeps_up_synchronously=answer_s * control_hz <= 1 + 1e-9,
        delay_steps=delay,
        horizon=horizon,
        execute_steps=(delay, horizon - delay) if delay <= horizon - delay else None,
    )
