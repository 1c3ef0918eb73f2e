"""Which version of which policy a module of RLlib is: plain settings that travel, never a connection."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vla_dist.core.errors import ConfigError
from vla_dist.core.types import PolicyArtifact
from vla_dist.registry.blobs import open_blobs
from vla_dist.registry.comparison import read_files
from vla_dist.registry.store import RedisPolicyRegistry


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySource:
    """A folder as ``vla-dist registry pull`` writes it, or a reference and its registry."""

    folder: str = ""
    """That every node reaches under this path."""
    redis_url: str = ""
    reference: str = ""
    """``name@channel`` or ``name@17``."""
    blobs: str = ""
    """Where the registry's tensors lie, if not in that Redis."""

    def __post_init__(self) -> None:
        if bool(self.folder) == bool(self.redis_url and self.reference):
            raise ConfigError(
                "a policy comes from a folder, or from a redis_url and a reference such as demo@stable; got "
                f"{'both' if self.folder else 'neither'}"
            )

    def load(self) -> PolicyArtifact:
        """Raises NotFound, IntegrityError, Unreachable."""
        if self.folder:
            return read_files(Path(self.folder))
        registry = self._registry()
        return registry.fetch(self.reference.partition("@")[0], registry.resolve(self.reference))

    def pinned(self) -> "PolicySource":
        """The same version for every process, wherever its channel moves meanwhile."""
        if self.folder:
            return replace(self, folder=str(Path(self.folder).resolve()))
        version = self._registry().resolve(self.reference)
        return replace(self, reference=f"{self.reference.partition('@')[0]}@{version}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def _registry(self) -> RedisPolicyRegistry:
        return RedisPolicyRegistry(self.redis_url, open_blobs(self.blobs or self.redis_url))
