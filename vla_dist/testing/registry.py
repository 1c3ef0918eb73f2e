"""A policy registry in memory: the registry's promises without a server, for tests of whoever follows it."""

import hashlib
import threading
import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from vla_dist.core.errors import DataError, NotFound
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Array, PolicyArtifact, PolicyManifest
from vla_dist.testing.fakes import FakePolicy


class InMemoryRegistry:
    """Thread-safe; versions count from 1 per name."""

    def __init__(self) -> None:
        self._artifacts: dict[tuple[str, int], PolicyArtifact] = {}
        self._channels: dict[tuple[str, str], int] = {}
        self._changed = threading.Condition()

    def publish(self, artifact: PolicyArtifact, *, channel: str | None = None) -> int:
        name = artifact.manifest.name
        with self._changed:
            version = 1 + max((v for n, v in self._artifacts if n == name), default=0)
            manifest = replace(
                artifact.manifest,
                version=version,
                tensors_sha256=_digest(artifact.tensors),
                num_bytes=sum(tensor.nbytes for tensor in artifact.tensors.values()),
            )
            self._artifacts[name, version] = replace(artifact, manifest=manifest)
            if channel is not None:
                self._channels[name, channel] = version
            self._changed.notify_all()
        return version

    def resolve(self, reference: str) -> int:
        name, _, target = reference.partition("@")
        with self._changed:
            version = int(target) if target.isdigit() else self._channels.get((name, target), 0)
            if (name, version) not in self._artifacts:
                known = sorted(f"{n}@{c}" for n, c in self._channels)
                raise NotFound(f"no policy {reference!r}; known references are {', '.join(known) or 'none'}")
        return version

    def fetch(self, name: str, version: int) -> PolicyArtifact:
        with self._changed:
            artifact = self._artifacts.get((name, version))
        if artifact is None:
            raise NotFound(f"no version {version} of policy {name!r}; publish it first")
        return artifact

    def follow(self, reference: str, *, after: int, timeout_s: float) -> int:
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                try:
                    version = self.resolve(reference)
                except NotFound:
                    version = after
                remaining = deadline - time.monotonic()
                if version != after or remaining <= 0:
                    return version
                self._changed.wait(remaining)

    def set_channel(self, name: str, channel: str, version: int) -> None:
        with self._changed:
            if (name, version) not in self._artifacts:
                raise NotFound(f"no version {version} of policy {name!r}; publish it before pointing a channel at it")
            self._channels[name, channel] = version
            self._changed.notify_all()

    def manifests(self, name: str) -> list[PolicyManifest]:
        with self._changed:
            return [a.manifest for (n, _), a in sorted(self._artifacts.items(), key=lambda kv: kv[0]) if n == name]


def fake_artifact(spec: EnvSpec, *, name: str = "demo", bias: float = 0.0, horizon: int = 1) -> PolicyArtifact:
    """An artifact that ``load_fake`` turns into a FakePolicy with this bias."""
    manifest = PolicyManifest(name=name, architecture="fake", config={}, spec=spec, horizon=horizon)
    return PolicyArtifact(manifest=manifest, tensors={"bias": np.array([bias], np.float32)})


def load_fake(artifact: PolicyArtifact) -> FakePolicy:
    """A core PolicyLoader for ``fake_artifact``."""
    if artifact.manifest.architecture != "fake":
        raise DataError(f"architecture {artifact.manifest.architecture!r} is not a fake; use the zoo's loader")
    return FakePolicy(
        artifact.manifest.spec, horizon=artifact.manifest.horizon, bias=float(artifact.tensors["bias"][0])
    )


def _digest(tensors: Mapping[str, Array]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].tobytes())
    return digest.hexdigest()
