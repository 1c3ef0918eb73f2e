"""How long something will take at most, from how long it took lately."""

_MEAN_GAIN = 1 / 8
_DEVIATION_GAIN = 1 / 4
_NUM_DEVIATIONS = 4


class Expectation:
    """Mean and mean deviation of durations, the newest weighted most (RFC 6298, equations 2.2 and 2.3).

    The same question as that of a retransmission timer: how long to allow, so that being wrong is rare.
    """

    def __init__(self) -> None:
        self.mean_s = 0.0
        self._deviation_s = 0.0
        self._has_measured = False

    @property
    def most_s(self) -> float:
        """What is rarely exceeded; 0 before the first measurement."""
        return self.mean_s + _NUM_DEVIATIONS * self._deviation_s

    def measure(self, duration_s: float) -> None:
        if not self._has_measured:
            self._has_measured = True
            self.mean_s, self._deviation_s = duration_s, duration_s / 2
            return
        error_s = duration_s - self.mean_s
        self._deviation_s += _DEVIATION_GAIN * (abs(error_s) - self._deviation_s)
        self.mean_s += _MEAN_GAIN * error_s
