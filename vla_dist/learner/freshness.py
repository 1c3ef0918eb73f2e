"""How old what a learner trains on is: versions behind, and seconds since it was stored."""

import threading
from collections.abc import Mapping

import numpy as np

from vla_dist.core.types import Batch


class Freshness:
    """Notes batches in the loader's thread, tells in the trainer's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._versions: list[int] = []
        self._ages_s: list[float] = []
        self._sources: dict[str, int] = {}

    def note(self, batch: Batch) -> None:
        acted = [int(v) for v, source in zip(batch.policy_versions, batch.sources, strict=True) if source == "policy"]
        with self._lock:
            self._versions += acted
            if batch.ages_s is not None:
                self._ages_s += batch.ages_s.tolist()
            for source in batch.sources:
                self._sources[source] = self._sources.get(source, 0) + 1

    def drain(self, current_version: int) -> Mapping[str, float]:
        """Of the batches since the last call. Experts and persons act as no version, so only policies are stale.

        Args:
            current_version: that was published last; 0: none yet.
        """
        with self._lock:
            versions, ages, sources = self._versions, self._ages_s, self._sources
            self._versions, self._ages_s, self._sources = [], [], {}
        metrics = _percentiles("sample_age_s", np.array(ages))
        if current_version:
            metrics |= _percentiles("staleness", np.maximum(current_version - np.array(versions, np.float64), 0.0))
        total = sum(sources.values())
        return metrics | {f"share_{source}": count / total for source, count in sources.items()}


def _percentiles(name: str, values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    return {f"{name}_p{q}": float(np.percentile(values, q)) for q in (50, 99)}
