"""Per-feature statistics as LeRobot stores them: min, max, mean, std, count and five quantiles.

Source: huggingface/lerobot 0.4, ``lerobot/datasets/compute_stats.py``. Quantiles of one episode are exact; those of a
data set are the means of its episodes', weighted by their steps, as there.

Dimensions: L steps, D numbers of a feature.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vla_dist.core.types import Array

_QUANTILES = (0.01, 0.10, 0.50, 0.90, 0.99)
_MOST_FRAMES = 32
"""Frames of an episode that its camera's statistics look at."""

Statistics = Mapping[str, Array]


def vector_statistics(values: Array) -> dict[str, Array]:
    """Of (L, D); each entry (D,), ``count`` (1,)."""
    values = np.asarray(values, np.float64)
    found = {
        "min": values.min(axis=0),
        "max": values.max(axis=0),
        "mean": values.mean(axis=0),
        "std": values.std(axis=0),
        "count": np.array([len(values)]),
    }
    quantiles = np.quantile(values, _QUANTILES, axis=0)
    return found | {f"q{round(100 * share):02d}": row for share, row in zip(_QUANTILES, quantiles, strict=True)}


def image_statistics(frames: Array) -> dict[str, Array]:
    """Of (L, H, W, 3) uint8, some frames of them, in 0..1; each entry (3, 1, 1), ``count`` (1,)."""
    chosen = frames[np.unique(np.linspace(0, len(frames) - 1, min(_MOST_FRAMES, len(frames))).astype(int))]
    found = vector_statistics(chosen.reshape(-1, 3) / 255.0)
    return {
        name: np.array([len(chosen)]) if name == "count" else value.reshape(3, 1, 1) for name, value in found.items()
    }


class MergedStatistics:
    """Of a data set, from those of its episodes."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: dict[str, Array] = {}
        self._squares: Array | None = None
        self._extremes: dict[str, Array] = {}

    def add(self, episode: Statistics) -> None:
        count = int(episode["count"][0])
        self._count += count
        for name, value in episode.items():
            if name == "min":
                self._extremes[name] = np.minimum(self._extremes.get(name, value), value)
            elif name == "max":
                self._extremes[name] = np.maximum(self._extremes.get(name, value), value)
            elif name not in ("count", "std"):
                self._sums[name] = self._sums.get(name, np.zeros_like(value)) + count * value
        square = count * (episode["std"] ** 2 + episode["mean"] ** 2)
        self._squares = square if self._squares is None else self._squares + square

    def result(self) -> dict[str, Any]:
        """As JSON takes it."""
        assert self._squares is not None, "add comes first"
        merged = {name: total / self._count for name, total in self._sums.items()}
        variance = np.maximum(self._squares / self._count - merged["mean"] ** 2, 0.0)
        merged |= {**self._extremes, "std": np.sqrt(variance), "count": np.array([self._count])}
        return {name: value.tolist() for name, value in merged.items()}
