"""Latencies of any number of robots in a fixed space, mergeable and readable at any percentile."""

import math
from collections.abc import Iterable, Mapping

from vla_dist.core.types import Metrics

_FIRST_S = 1e-4
_RATIO = 1.05
_NUM_BUCKETS = 300
"""From 0.1 ms to 225 s, each bucket 5 % wider than the one before: a percentile is off by 2.5 % at most."""
_PREFIX = "latency_bucket_"


class LatencyHistogram:
    """Counts by logarithmic bucket; as metrics, one number for each bucket in use."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def add(self, latency_s: float) -> None:
        bucket = int(math.log(max(latency_s, _FIRST_S) / _FIRST_S) / math.log(_RATIO))
        bucket = min(bucket, _NUM_BUCKETS - 1)
        self._counts[bucket] = self._counts.get(bucket, 0) + 1

    def percentile(self, percent: float) -> float:
        """Seconds; the middle of the bucket that holds it. 0 while empty."""
        total = sum(self._counts.values())
        seen = 0
        for bucket in sorted(self._counts):
            seen += self._counts[bucket]
            if seen >= percent / 100 * total:
                return _FIRST_S * _RATIO ** (bucket + 0.5)
        return 0.0

    def to_metrics(self) -> Metrics:
        return {f"{_PREFIX}{bucket}": float(count) for bucket, count in self._counts.items()}

    @classmethod
    def merged(cls, metrics: Iterable[Mapping[str, float]]) -> "LatencyHistogram":
        """The sum of what several robots put into their metrics."""
        histogram = cls()
        for one in metrics:
            for name, count in one.items():
                if name.startswith(_PREFIX):
                    bucket = int(name.removeprefix(_PREFIX))
                    histogram._counts[bucket] = histogram._counts.get(bucket, 0) + int(count)
        return histogram
