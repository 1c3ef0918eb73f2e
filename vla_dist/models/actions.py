"""Actions between a robot's units and the [-1, 1] that models work in."""

from dataclasses import dataclass

import numpy as np

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.core.specs import ActionKind, EnvSpec
from vla_dist.core.types import Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ActionCodec:
    """Continuous actions are scaled by their bounds; discrete ones stay one-hot over A choices."""

    kind: ActionKind
    low: Array
    """(A,) float32, raw units."""
    high: Array
    """(A,) float32, raw units."""

    @classmethod
    def of(cls, spec: EnvSpec) -> "ActionCodec":
        """Raises ConfigError when a continuous dimension has an open bound."""
        open_ended = [d.name for d in spec.action if not np.isfinite([d.low, d.high]).all()]
        if spec.action_kind == "continuous" and open_ended:
            raise ConfigError(
                f"spec {spec.name!r}: actions {open_ended} have no finite bounds, so they cannot be scaled to "
                "[-1, 1]; give each one a low and a high"
            )
        return cls(
            kind=spec.action_kind,
            low=np.array([d.low for d in spec.action], np.float32),
            high=np.array([d.high for d in spec.action], np.float32),
        )

    def encode(self, actions: Array) -> Array:
        """(..., A) raw to (..., A) float32 in [-1, 1], clipped to the bounds; one-hot rows pass unchanged."""
        if actions.shape[-1] != len(self.low):
            raise DataError(f"actions of shape {actions.shape} must end in {len(self.low)}, the spec's action_dim")
        if self.kind == "discrete":
            return np.asarray(actions, np.float32)
        unit = (np.asarray(actions, np.float32) - self.low) * (2.0 / (self.high - self.low)) - 1.0
        return np.clip(unit, -1.0, 1.0).astype(np.float32)

    def decode(self, outputs: Array) -> Array:
        """(..., A) model outputs to (..., A) float32 raw units, within bounds; logits to the one-hot of the largest."""
        if self.kind == "discrete":
            return np.eye(len(self.low), dtype=np.float32)[np.argmax(outputs, axis=-1)]
        raw = self.low + (np.clip(outputs, -1.0, 1.0) + 1.0) * (0.5 * (self.high - self.low))
        return np.clip(raw, self.low, self.high).astype(np.float32)
