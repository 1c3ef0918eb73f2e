"""What a table is: the settings every client of it must agree on."""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from vla_dist.core.errors import ConfigError
from vla_dist.core.specs import EnvSpec
from vla_dist.data.segment_codec import SegmentCodec
from vla_dist.replay.limiter import LimiterConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class TableConfig:
    """One named table."""

    name: str = "default"
    """Letters, digits, ``.``, ``_`` and ``-``, at most 64."""
    num_steps: int = 32
    """T, rows of every segment."""
    context_steps: int = 20
    """K, steps of a sampled window. A reader's own choice: not part of what clients must agree on."""
    capacity_steps: int = 1_000_000
    """Valid steps kept; the episode that began first is evicted first, whole."""
    limiter: LimiterConfig = field(default_factory=LimiterConfig)
    """In force until ``override_limiter``."""
    remembered_episodes: int = 100_000
    """Evicted episodes whose late retries are still recognised as duplicates."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", self.name):
            raise ConfigError(f"table name {self.name!r} must be 1 to 64 letters, digits, '.', '_' or '-'")
        for name in ("num_steps", "context_steps", "capacity_steps", "remembered_episodes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"table {self.name!r}: {name} {getattr(self, name)} must be at least 1")

    def require_capacity(self, spec: EnvSpec) -> None:
        """Refuse a capacity at which sampling could never start.

        Only complete episodes can be sampled and whole episodes are evicted, so beside ``min_steps`` there must be
        room for one episode that is still open and for one that has just gone. Each further writer needs room for one
        more.

        Raises:
            ConfigError: too small, with the smallest capacity that works.
        """
        needed = self.limiter.min_steps + 2 * spec.max_episode_steps
        if self.capacity_steps < needed:
            raise ConfigError(
                f"table {self.name!r}: capacity_steps {self.capacity_steps} must be at least {needed}: min_steps "
                f"{self.limiter.min_steps} plus two episodes of {spec.max_episode_steps} steps, one open and one just "
                "evicted; with less the limiter might wait for ever for complete episodes"
            )

    def identity(self, spec: EnvSpec, codec: SegmentCodec) -> str:
        """JSON of what clients must agree on."""
        fields = {
            "spec": spec.digest,
            "schema": codec.schema_id,
            "num_steps": self.num_steps,
            "capacity_steps": self.capacity_steps,
            "min_steps": self.limiter.min_steps,
            "samples_per_insert": self.limiter.samples_per_insert,
            "error_buffer_steps": self.limiter.error_buffer_steps,
            "remembered_episodes": self.remembered_episodes,
        }
        return json.dumps(fields, sort_keys=True)

    def stored_fields(self, spec: EnvSpec) -> dict[str, Any]:
        """What the server's functions read; the spec's JSON is kept so that a stranger can decode the rows."""
        return {
            "num_steps": self.num_steps,
            "capacity_steps": self.capacity_steps,
            "min_steps": self.limiter.min_steps,
            "samples_per_insert": ratio_field(self.limiter.samples_per_insert),
            "error_buffer_steps": repr(float(self.limiter.error_buffer_steps)),
            "remembered_episodes": self.remembered_episodes,
            "num_cameras": len(spec.cameras),
            "spec_json": spec.to_json(),
        }


def ratio_field(samples_per_insert: float | None) -> str:
    """-1 stands for no ratio."""
    return "-1" if samples_per_insert is None else repr(float(samples_per_insert))


def require_same_identity(name: str, mine: str, stored: str) -> None:
    """Raise ConfigError naming each field in which a client differs from the table as it was created."""
    if mine == stored:
        return
    ours, theirs = json.loads(mine), json.loads(stored)
    differing = [
        f"{key} {ours.get(key)!r} against {theirs.get(key)!r}"
        for key in sorted(set(ours) | set(theirs))
        if ours.get(key) != theirs.get(key)
    ]
    raise ConfigError(
        f"table {name!r} was created with another configuration: {'; '.join(differing)} (yours against the table's). "
        "Use the table's, another table name, or override_limiter() for the limiter"
    )
