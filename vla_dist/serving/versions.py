"""The versions a replica has loaded: a new one is made ready beside the old; an episode keeps the one it began with."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_dist.core.errors import ConfigError, DataError, NotFound, ResourceMissing, VlaDistError
from vla_dist.core.protocols import Policy, PolicyLoader, PolicyRegistry
from vla_dist.core.types import Observation, PolicyManifest

_log = logging.getLogger(__name__)
_LONGEST_WAY_GIVEN_S = 0.1
"""A server that always computes gets its new version, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionsConfig:
    """What a replica follows."""

    references: tuple[str, ...]
    """``name@channel`` each; robots may ask for these only."""
    warm_up_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Batch sizes to run before a version gets its first robot: the batcher's buckets. Where a version of the same
    architecture and settings is in memory already, the first of them alone: this process has run the others."""
    max_loaded: int = 6
    """Versions in memory at once, canary and shadow among them; a newer one waits until an old one's last episode
    ends."""
    poll_s: float = 1.0
    """Longest wait for the registry in one call; also how fast a close is noticed."""
    retry_s: float = 5.0
    """Pause after a version that could not be loaded."""

    def __post_init__(self) -> None:
        for reference in self.references:
            name, at, channel = reference.partition("@")
            if not (name and at and channel):
                raise ConfigError(f"reference {reference!r} must be written name@channel")
        if not self.references:
            raise ConfigError("no reference to follow; name at least one, for example demo@stable")
        if self.max_loaded < len(self.references) + 1:
            raise ConfigError(
                f"max_loaded {self.max_loaded} must be at least {len(self.references) + 1}: one for each reference and "
                "one to make ready beside them"
            )


@dataclass(slots=True, eq=False)
class LoadedPolicy:
    """One version in memory."""

    name: str
    version: int
    policy: Policy[Any]
    manifest: PolicyManifest
    num_sessions: int = 0


class PolicyVersions:
    """Follows channels, and gives each session a version that stays until the session ends.

    ``start`` loads what the channels point at and then follows them in threads of its own: fetch (the registry
    verifies the hash), build, warm up, and only then the flip. A version that cannot be made ready is never served:
    the old one stays, ``problems`` says why, and it is tried again.
    """

    def __init__(
        self,
        registry: PolicyRegistry,
        load: PolicyLoader,
        config: VersionsConfig,
        *,
        wait_until_idle: Callable[[float], bool] = lambda timeout_s: True,
    ) -> None:
        """Args:
        registry: that is followed.
        load: builds a policy of an artifact.
        config: what is followed, and how.
        wait_until_idle: returns when no robot waits for an answer, or after so many seconds; asked before each part of
            making a version ready.
        """
        self.config = config
        self._wait_until_idle = wait_until_idle
        self.registry = registry
        self._load_policy = load
        self._loaded: dict[tuple[str, int], LoadedPolicy] = {}
        self._current: dict[str, LoadedPolicy] = {}
        self._kept: dict[str, LoadedPolicy] = {}
        self._problems: dict[str, str] = {}
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        """Held while one version is made ready, so that a crowd that asks for it loads it once."""
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Load what every reference points at, then follow. Raises what the registry and the loader raise."""
        for reference in self.config.references:
            loaded = self._make_ready(_name(reference), self.registry.resolve(reference))
            with self._lock:
                self._current[reference] = loaded
            thread = threading.Thread(target=self._follow, args=(reference,), name=f"follow-{reference}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def acquire(self, reference: str, policy_version: int = 0) -> LoadedPolicy:
        """A ready version for one session; ``release`` it when the session ends.

        Blocking: only where ``policy_version`` names one that is not loaded, as after the death of another replica.

        Raises:
            NotFound: the reference is not served here, or the registry has no such version.
            ResourceMissing: ``max_loaded`` versions are in use.
        """
        with self._lock:
            current = self._current.get(reference)
            if current is None:
                served = ", ".join(self._current) or "nothing yet"
                raise NotFound(f"policy {reference!r} is not served here; this server has {served}")
            wanted = self._loaded.get((current.name, policy_version)) if policy_version else current
            if wanted is not None:
                wanted.num_sessions += 1
                return wanted
        self._make_ready(current.name, policy_version, for_session=True)
        return self.acquire(reference, policy_version)

    def is_loaded(self, reference: str, policy_version: int) -> bool:
        """Whether ``acquire`` will return at once."""
        with self._lock:
            return not policy_version or (_name(reference), policy_version) in self._loaded

    def release(self, loaded: LoadedPolicy) -> None:
        """End one session; an old version leaves with its last."""
        with self._lock:
            loaded.num_sessions -= 1
            self._drop_unused()

    def keep(self, purpose: str, name: str, version: int) -> LoadedPolicy:
        """Have a version ready, and keep it in place of what was kept for this purpose before.

        Blocking: while it is loaded. Raises what the registry and the loader raise.
        """
        loaded = self._make_ready(name, version)
        with self._lock:
            self._kept[purpose] = loaded
            self._drop_unused()
        return loaded

    def let_go(self, purpose: str) -> None:
        """Keep nothing for this purpose any more; running sessions go on."""
        with self._lock:
            self._kept.pop(purpose, None)
            self._drop_unused()

    def current(self) -> dict[str, int]:
        """Reference -> version that new episodes get."""
        with self._lock:
            return {reference: loaded.version for reference, loaded in self._current.items()}

    def sessions(self) -> dict[tuple[str, int], int]:
        """(name, version) -> running sessions, of every version in memory."""
        with self._lock:
            return {key: loaded.num_sessions for key, loaded in self._loaded.items()}

    def problems(self) -> tuple[str, ...]:
        """One sentence for each reference whose newest version is not served."""
        with self._lock:
            return tuple(self._problems.values())

    def close(self) -> None:
        self._closing.set()
        for thread in self._threads:
            thread.join(self.config.poll_s + 10.0)

    def _follow(self, reference: str) -> None:
        while not self._closing.is_set():
            served = self.current()[reference]
            try:
                version = self.registry.follow(reference, after=served, timeout_s=self.config.poll_s)
                if version != served:
                    self._flip(reference, version)
                with self._lock:
                    self._problems.pop(reference, None)
            except Exception as error:  # noqa: BLE001 - whatever a new version does, the old one goes on
                problem = f"{reference} stays at version {served}: {error}"
                _log.warning("%s", problem, exc_info=None if isinstance(error, VlaDistError) else error)
                with self._lock:
                    self._problems[reference] = problem
                self._closing.wait(self.config.retry_s)

    def _flip(self, reference: str, version: int) -> None:
        started = time.monotonic()
        loaded = self._make_ready(_name(reference), version)
        with self._lock:
            old = self._current[reference].version
            self._current[reference] = loaded
            self._drop_unused()
        _log.info("%s: version %d -> %d, ready in %.2f s", reference, old, version, time.monotonic() - started)

    def _make_ready(self, name: str, version: int, *, for_session: bool = False) -> LoadedPolicy:
        with self._loading:
            with self._lock:
                known = self._loaded.get((name, version))
                if known is not None:
                    return known
                # A session's request must leave room for the next version of each channel.
                room = self.config.max_loaded - (1 if for_session else 0)
                if len(self._loaded) >= room:
                    held = ", ".join(f"{n} {v} ({p.num_sessions} sessions)" for (n, v), p in self._loaded.items())
                    raise ResourceMissing(
                        f"version {version} of {name} waits: {len(self._loaded)} versions are loaded, the most allowed "
                        f"({held}); let episodes end or raise max_loaded"
                    )
            artifact = self.registry.fetch(name, version)
            self._wait_until_idle(_LONGEST_WAY_GIVEN_S)
            policy = self._load_policy(artifact)
            self._wait_until_idle(_LONGEST_WAY_GIVEN_S)
            warm_up(policy, self.config.warm_up_sizes[: 1 if self._has_twin(artifact.manifest) else None])
            loaded = LoadedPolicy(name, version, policy, artifact.manifest)
            with self._lock:
                self._loaded[name, version] = loaded
            return loaded

    def _has_twin(self, manifest: PolicyManifest) -> bool:
        """Whether a loaded version differs in its weights alone. A warm-up takes the robots' cores."""

        def kind(one: PolicyManifest) -> tuple[Any, ...]:
            return one.architecture, one.config.get("model", one.config), one.spec, one.horizon

        with self._lock:
            return any(kind(loaded.manifest) == kind(manifest) for loaded in self._loaded.values())

    def _drop_unused(self) -> None:
        served = set(map(id, [*self._current.values(), *self._kept.values()]))
        for key, loaded in list(self._loaded.items()):
            if loaded.num_sessions == 0 and id(loaded) not in served:
                del self._loaded[key]
                _log.info("version %d of %s left with its last session", loaded.version, loaded.name)


def warm_up(policy: Policy[Any], batch_sizes: Sequence[int]) -> None:
    """Run blank observations, so that the first robot pays for no allocation or compilation.

    Raises:
        DataError: the chunks do not have the shape that the policy promises, or are not finite.
    """
    spec = policy.spec
    blank = Observation(
        proprio=np.zeros(spec.proprio_dim, np.float32),
        images={c.name: np.zeros((c.height, c.width, 3), np.uint8) for c in spec.cameras},
    )
    expected = (policy.horizon, spec.action_dim)
    for size in batch_sizes:
        chunks, states = policy.act([blank] * size, [policy.initial_state() for _ in range(size)])
        kinds = {(chunk.shape, str(chunk.dtype)) for chunk in chunks}
        if len(chunks) != size or len(states) != size or kinds != {(expected, "float32")}:
            raise DataError(
                f"{size} observations gave {len(chunks)} chunks of {kinds} and {len(states)} states, "
                f"expected {size} float32 chunks of {expected} and {size} states"
            )
        if not all(np.isfinite(chunk).all() for chunk in chunks):
            raise DataError("a blank observation gave actions that are not finite; the weights are broken")


def _name(reference: str) -> str:
    return reference.partition("@")[0]
