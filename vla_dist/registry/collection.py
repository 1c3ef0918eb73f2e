"""Which versions' tensors may go, and their removal. Manifests and history stay: they are small, and people ask.

A version is kept while a channel points at it, while a follower has it in use, among the newest of its name, and while
it is young. Publishers and a collection exclude each other, see ``RedisPolicyRegistry.collecting``.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass

from vla_dist.core.errors import ConfigError
from vla_dist.core.types import PolicyManifest
from vla_dist.registry.store import COLLECTION_S, RedisPolicyRegistry


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectionConfig:
    """What is kept beside what is in use."""

    keep_newest: int = 10
    """Versions of each name."""
    min_age_s: float = 24 * 3600.0
    """Younger versions are kept: somebody may be about to point a channel at them."""

    def __post_init__(self) -> None:
        if self.keep_newest < 1 or self.min_age_s < 0:
            raise ConfigError(
                f"keep_newest {self.keep_newest} must be at least 1, min_age_s {self.min_age_s} not negative: the "
                "newest version is what the next one is compared with"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One version, and why its tensors stay or go."""

    manifest: PolicyManifest
    reason: str
    """Empty: they may go."""

    @property
    def may_go(self) -> bool:
        return not self.reason


def judge(registry: RedisPolicyRegistry, name: str, config: CollectionConfig) -> list[Verdict]:
    """Every version of a name whose tensors are still there, oldest first."""
    manifests, gone = registry.manifests(name), registry.collected(name)
    pointed: dict[int, list[str]] = {}
    for channel, version in registry.channels(name).items():
        pointed.setdefault(version, []).append(channel)
    held, newest = registry.held(name), {m.version for m in manifests[-config.keep_newest :]}
    verdicts = []
    for manifest in manifests:
        if manifest.version in gone:
            continue
        reason = ""
        if manifest.version in pointed:
            reason = f"channel {', '.join(pointed[manifest.version])}"
        elif manifest.version in held:
            reason = "in use by a follower"
        elif manifest.version in newest:
            reason = f"among the newest {config.keep_newest}"
        elif time.time() - manifest.created_unix_s < config.min_age_s:
            reason = "young"
        verdicts.append(Verdict(manifest=manifest, reason=reason))
    return verdicts


def collect(registry: RedisPolicyRegistry, names: Iterable[str], config: CollectionConfig) -> tuple[list[str], int]:
    """Remove what may go at this moment.

    Returns:
        References whose tensors were given up now, and the bytes that this freed: tensors that another version shares
        stay.
    """
    given_up: list[str] = []
    for name in names:
        chosen = [verdict.manifest.version for verdict in judge(registry, name, config) if verdict.may_go]
        given_up += [f"{name}@{version}" for version in registry.retire(name, chosen)]
    freed = 0
    while True:
        bytes_now, finished = _sweep(registry)
        freed += bytes_now
        if finished:
            return given_up, freed


def _sweep(registry: RedisPolicyRegistry) -> tuple[int, bool]:
    """Delete tensors that no version needs any more, those that a killed collection left behind included."""
    freed, deadline = 0, time.monotonic() + COLLECTION_S / 2
    with registry.collecting() as being_published:
        needed, unneeded = set(being_published), dict[str, int]()
        for name in registry.names():
            gone = registry.collected(name)
            for manifest in registry.manifests(name):
                if manifest.version in gone:
                    unneeded[manifest.tensors_sha256] = manifest.num_bytes
                else:
                    needed.add(manifest.tensors_sha256)
        for digest, num_bytes in unneeded.items():
            if digest in needed:
                continue
            if time.monotonic() > deadline:
                return freed, False
            if registry.blobs.delete(digest):
                freed += num_bytes
    return freed, True
