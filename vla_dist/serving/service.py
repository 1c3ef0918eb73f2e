"""The policy service itself: sessions, contracts and deadlines, with no network in it.

One episode::

    grant = await service.open(reference="demo@stable", spec=spec, robot_id="arm-3", task="drawer-open")
    chunk = await service.act(grant.session_id, observation, observation_id=0, deadline_s=0.1)
    await service.close(grant.session_id)
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vla_dist.core.errors import (
    ConfigError,
    ContractMismatch,
    DataError,
    DeadlineExceeded,
    NotFound,
    ResourceMissing,
    WorkerFailed,
)
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import FALLBACKS, ActionChunk, Array, Fallback, Observation
from vla_dist.protocol.records import PolicyInfo, ServiceHealth, SessionGrant, SessionLimits, VersionInfo
from vla_dist.serving.batcher import DeadlineBatcher
from vla_dist.serving.versions import LoadedPolicy, PolicyVersions

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """Admission and dead-man settings."""

    max_sessions: int = 256
    """Robots at once; the next one is refused. Serve's own limit does not hold for streams."""
    limits: SessionLimits = field(default_factory=SessionLimits)
    grace_ms: float = 100.0
    """A chunk of H actions is valid for H control periods and this much more."""
    fallback: Fallback = "hold"
    """What a robot does when its chunk has run out of time."""

    def __post_init__(self) -> None:
        if self.max_sessions < 1:
            raise ConfigError(f"max_sessions {self.max_sessions} must be at least 1")
        if self.fallback not in FALLBACKS:
            raise ConfigError(f"fallback {self.fallback!r} must be one of {', '.join(FALLBACKS)}")
        if self.grace_ms < 0:
            raise ConfigError(f"grace_ms {self.grace_ms} must not be negative")


@dataclass(slots=True, eq=False)
class _Session:
    loaded: LoadedPolicy
    state: Any
    last_used: float
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Observations of one session are computed in turn: each starts from the state the last one left."""


class PolicyService:
    """All policy memory of a robot lives in its session; gRPC and Serve only wrap this.

    Owns ``versions`` and ``batcher``: ``shut_down`` closes both.
    """

    def __init__(self, versions: PolicyVersions, batcher: DeadlineBatcher, config: ServiceConfig) -> None:
        self.versions = versions
        self.batcher = batcher
        self.config = config
        self.replica_id = uuid.uuid4().hex[:16]
        self._sessions: dict[str, _Session] = {}
        self._num_opening = 0

    async def check(self, *, reference: str, spec: EnvSpec, policy_version: int = 0) -> SessionGrant:
        """What ``open`` would grant, without a session. Raises as ``open`` does."""
        loaded = await self._acquire(reference, policy_version)
        try:
            loaded.policy.spec.require_match(spec)
            return self._grant(loaded, "")
        finally:
            self.versions.release(loaded)

    async def open(
        self,
        *,
        reference: str,
        spec: EnvSpec,
        robot_id: str,
        task: str,
        policy_version: int = 0,
        history: Sequence[Observation] = (),
        history_start: int = 0,
    ) -> SessionGrant:
        """Start a session.

        Args:
            reference: ``name@channel``.
            spec: of the robot; compared with the policy's before any motion.
            robot_id: for the log.
            task: for the log.
            policy_version: 0 for the channel's; a reconnecting episode names the one it began with.
            history: last K observations of an episode that reconnects, oldest first, with their executed actions.
            history_start: steps of the episode before the first of them.

        Raises:
            ContractMismatch: robot and policy differ; lists every difference.
            NotFound: policy or version is not served.
            ResourceMissing: too many sessions or versions.
            DataError: more history than the policy's context.
        """
        self._close_idle()
        if len(self._sessions) + self._num_opening >= self.config.max_sessions:
            raise ResourceMissing(
                f"{len(self._sessions)} robots are connected, the most allowed is {self.config.max_sessions}; "
                "add replicas or raise max_sessions"
            )
        self._num_opening += 1
        try:
            loaded = await self._acquire(reference, policy_version)
            try:
                loaded.policy.spec.require_match(spec)
                state = await self._rebuild(
                    loaded, history, history_start, deadline_s=self.config.limits.max_deadline_s
                )
            except BaseException:
                self.versions.release(loaded)
                raise
        finally:
            self._num_opening -= 1
        session_id = uuid.uuid4().hex
        self._sessions[session_id] = _Session(loaded, state, time.monotonic())
        _log.info("%s opened %s version %d for %r", robot_id or "a robot", reference, loaded.version, task)
        return self._grant(loaded, session_id)

    async def act(
        self, session_id: str, observation: Observation, *, observation_id: int, deadline_s: float
    ) -> ActionChunk:
        """The chunk for one observation; the session's memory moves on only where a chunk is returned.

        Raises:
            NotFound: no such session: closed, idle for too long, or of another replica.
            DeadlineExceeded: not computed in time.
            DataError: the deadline is out of bounds.
            ResourceMissing: the queue is full.
            WorkerFailed: the policy returned actions that are not finite.
        """
        session = self._sessions.get(session_id)
        if session is None:
            raise NotFound(f"no session {session_id!r} here; it ended or another replica holds it. Open a new one")
        self._require_deadline(deadline_s)
        started = time.monotonic()
        session.last_used = started
        try:
            await asyncio.wait_for(session.turn.acquire(), deadline_s)
        except asyncio.TimeoutError as error:
            raise DeadlineExceeded(
                f"the session was busy with an earlier observation for {1000 * deadline_s:.0f} ms; send a newer one"
            ) from error
        try:
            remaining = deadline_s - (time.monotonic() - started)
            actions, session.state = await self._advance(session.loaded, observation, session.state, remaining)
        finally:
            session.turn.release()
        return self._chunk(session.loaded, actions, observation_id)

    async def act_once(
        self,
        *,
        reference: str,
        policy_version: int,
        spec_digest: str,
        history: Sequence[Observation],
        history_start: int,
        observation: Observation,
        observation_id: int,
        deadline_s: float,
    ) -> ActionChunk:
        """One answer without a session: the caller brings all memory. Raises as ``open`` and ``act`` do."""
        self._require_deadline(deadline_s)
        started = time.monotonic()
        loaded = await self._acquire(reference, policy_version)
        try:
            if loaded.policy.spec.digest != spec_digest:
                raise ContractMismatch(
                    f"spec digest {spec_digest[:12]!r} is not the policy's {loaded.policy.spec.digest[:12]!r}; "
                    "call OpenSession with the whole spec, it lists every difference"
                )
            state = await self._rebuild(loaded, history, history_start, deadline_s=deadline_s)
            remaining = deadline_s - (time.monotonic() - started)
            actions, _ = await self._advance(loaded, observation, state, remaining)
            return self._chunk(loaded, actions, observation_id)
        finally:
            self.versions.release(loaded)

    async def close(self, session_id: str) -> None:
        """End a session; a second time does nothing."""
        session = self._sessions.pop(session_id, None)
        if session is not None:
            self.versions.release(session.loaded)

    def policies(self) -> tuple[PolicyInfo, ...]:
        """What is served, with every version that the registry knows. Blocking: reads the registry."""
        loaded = self.versions.sessions()
        return tuple(
            PolicyInfo(
                policy=reference,
                current_version=current,
                versions=tuple(
                    VersionInfo(
                        version=manifest.version,
                        parent=manifest.parent,
                        spec=manifest.spec,
                        horizon=manifest.horizon,
                        loaded=(manifest.name, manifest.version) in loaded,
                    )
                    for manifest in self.versions.registry.manifests(reference.partition("@")[0])
                ),
            )
            for reference, current in self.versions.current().items()
        )

    def spec_of(self, reference: str) -> EnvSpec:
        """Contract of the version that new episodes get; what a wire message is checked against before decoding."""
        loaded = self.versions.acquire(reference)
        self.versions.release(loaded)
        return loaded.policy.spec

    def health(self) -> ServiceHealth:
        return ServiceHealth(
            loaded=self.versions.sessions(),
            num_sessions=len(self._sessions),
            problems=self.versions.problems(),
            replica_id=self.replica_id,
        )

    def shut_down(self) -> None:
        """Stop following and computing; open sessions get Unreachable."""
        self.batcher.close()
        self.versions.close()

    async def _acquire(self, reference: str, policy_version: int) -> LoadedPolicy:
        if self.versions.is_loaded(reference, policy_version):
            return self.versions.acquire(reference, policy_version)
        # Loading a pinned version takes seconds; the other robots' streams go on meanwhile.
        return await asyncio.get_running_loop().run_in_executor(None, self.versions.acquire, reference, policy_version)

    async def _rebuild(
        self, loaded: LoadedPolicy, history: Sequence[Observation], history_start: int, *, deadline_s: float
    ) -> Any:
        if len(history) > loaded.policy.context_steps:
            raise DataError(
                f"the history has {len(history)} observations, expected at most the policy's "
                f"{loaded.policy.context_steps}"
            )
        deadline = time.monotonic() + deadline_s
        state = loaded.policy.initial_state(timestep=history_start)
        for observation in history:
            _, state = await self._advance(loaded, observation, state, deadline - time.monotonic())
        return state

    async def _advance(
        self, loaded: LoadedPolicy, observation: Observation, state: Any, deadline_s: float
    ) -> tuple[Array, Any]:
        actions, state = await self.batcher.submit(loaded.policy, observation, state, deadline_s=deadline_s)
        if not np.isfinite(actions).all():
            raise WorkerFailed(
                f"version {loaded.version} of {loaded.name} returned actions that are not finite; roll it back"
            )
        return actions, state

    def _chunk(self, loaded: LoadedPolicy, actions: Array, observation_id: int) -> ActionChunk:
        return ActionChunk(
            actions=actions,
            policy_version=loaded.version,
            observation_id=observation_id,
            valid_for_ms=1000.0 * loaded.policy.horizon / loaded.policy.spec.control_hz + self.config.grace_ms,
            fallback=self.config.fallback,
        )

    def _grant(self, loaded: LoadedPolicy, session_id: str) -> SessionGrant:
        return SessionGrant(
            policy_version=loaded.version,
            horizon=loaded.policy.horizon,
            context_steps=loaded.policy.context_steps,
            limits=self.config.limits,
            spec_digest=loaded.policy.spec.digest,
            session_id=session_id,
        )

    def _require_deadline(self, deadline_s: float) -> None:
        longest = self.config.limits.max_deadline_s
        if not 0 < deadline_s <= longest:
            raise DataError(f"deadline {deadline_s} s must be above 0 and at most {longest} s")

    def _close_idle(self) -> None:
        oldest = time.monotonic() - self.config.limits.idle_timeout_s
        for session_id, session in list(self._sessions.items()):
            if session.last_used < oldest and not session.turn.locked():
                del self._sessions[session_id]
                self.versions.release(session.loaded)
