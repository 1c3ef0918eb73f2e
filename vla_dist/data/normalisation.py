"""Running mean and standard deviation of vectors, mergeable across processes.

Source: Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vla_dist.core.errors import DataError
from vla_dist.core.types import Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunningMoments:
    """Count, mean and sum of squared deviations of D numbers. Immutable: each update gives a new one."""

    count: int
    """Vectors seen."""
    mean: Array
    """(D,) float64."""
    sum_squares: Array
    """(D,) float64, sum of squared deviations from the mean."""

    @classmethod
    def empty(cls, dimension: int) -> "RunningMoments":
        return cls(count=0, mean=np.zeros(dimension), sum_squares=np.zeros(dimension))

    def update(self, values: Array) -> "RunningMoments":
        """Add (N, D) vectors. Raises DataError on another D or numbers that are not finite."""
        values = np.asarray(values, np.float64)
        if values.ndim != 2 or values.shape[1] != len(self.mean):
            raise DataError(f"values of shape {values.shape}, expected (N, {len(self.mean)})")
        if not np.isfinite(values).all():
            raise DataError("values hold NaN or infinity; moments of them would be useless, drop those steps")
        if not len(values):
            return self
        mean = values.mean(axis=0)
        return self.merge(
            RunningMoments(count=len(values), mean=mean, sum_squares=np.square(values - mean).sum(axis=0))
        )

    def merge(self, other: "RunningMoments") -> "RunningMoments":
        """Moments of the union of what both have seen."""
        count = self.count + other.count
        if count == 0:
            return self
        shift = other.mean - self.mean
        return RunningMoments(
            count=count,
            mean=self.mean + shift * (other.count / count),
            sum_squares=self.sum_squares + other.sum_squares + np.square(shift) * (self.count * other.count / count),
        )

    def std(self, *, floor: float = 1e-2) -> Array:
        """(D,) float64 population standard deviation; below ``floor`` it answers 1.

        A dimension that hardly moves is centred and left unscaled: dividing by its tiny deviation would turn sensor
        noise into the loudest input.
        """
        if self.count == 0:
            return np.ones_like(self.mean)
        std = np.sqrt(self.sum_squares / self.count)
        return np.where(std < floor, 1.0, std)

    def to_arrays(self) -> dict[str, Array]:
        """What ``from_arrays`` reads back, ready for safetensors."""
        return {"count": np.array([self.count], np.int64), "mean": self.mean, "sum_squares": self.sum_squares}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> "RunningMoments":
        """Raises DataError where an array is missing or the sizes differ."""
        missing = {"count", "mean", "sum_squares"} - set(arrays)
        if missing or arrays["mean"].shape != arrays["sum_squares"].shape:
            raise DataError(
                f"arrays {sorted(arrays)} are not moments: missing {sorted(missing)} or unequal sizes; "
                "write them with RunningMoments.to_arrays()"
            )
        return cls(
            count=int(arrays["count"][0]),
            mean=np.asarray(arrays["mean"], np.float64),
            sum_squares=np.asarray(arrays["sum_squares"], np.float64),
        )
