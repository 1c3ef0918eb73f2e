"""The policy service itself: sessions, contracts and deadlines, with no network in it.

One episode::

    grant = await service.open(reference="demo@stable", spec=spec, robot_id="arm-3", task="drawer-open")
    chunk = await service.act(grant.session_id, observation, observation_id=0, deadline_s=0.1)
    await service.close(grant.session_id)
"""

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np

from vla_dist.core.errors import (
    ContractMismatch,
    DataError,
    DeadlineExceeded,
    ResourceMissing,
    Unreachable,
    WorkerFailed,
)
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import ActionChunk, Array, Observation
from vla_dist.protocol.records import (
    Outcome,
    PlanInProgress,
    PolicyInfo,
    PolicyState,
    ServiceHealth,
    SessionGrant,
    VersionInfo,
)
from vla_dist.registry.channel_moves import ChannelMoves
from vla_dist.serving.admission import RateLimit
from vla_dist.serving.assignment import CANARY, ChannelAssignment
from vla_dist.serving.batcher import DeadlineBatcher
from vla_dist.serving.carried_memory import CarriedMemory
from vla_dist.serving.event_log import EventLog
from vla_dist.serving.plan_joining import join_plan
from vla_dist.serving.service_config import ServiceConfig
from vla_dist.serving.sessions import Session, SessionTable
from vla_dist.serving.shadow import ShadowEpisode
from vla_dist.serving.state_sealing import StateSeal, service_id_of
from vla_dist.serving.versions import LoadedPolicy, PolicyVersions

_log = logging.getLogger(__name__)


class PolicyService:
    """All policy memory of a robot lives in its session; gRPC and Serve only wrap this.

    Owns ``versions``, ``batcher`` and ``assignment``: ``shut_down`` closes them.

    Args:
        key: secret that all replicas of one service share: it seals policy states that travel by the robots, and the
            service's public id follows from it. None: one of this process's own.
        assignment: canaries and shadows, started; None: there are none.
        shadow_log: where differences of shadows go.
        moves: by which the channels are moved from afar; None: they are not.
    """

    def __init__(
        self,
        versions: PolicyVersions,
        batcher: DeadlineBatcher,
        config: ServiceConfig,
        *,
        key: bytes | None = None,
        assignment: ChannelAssignment | None = None,
        shadow_log: EventLog | None = None,
        moves: ChannelMoves | None = None,
    ) -> None:
        self.versions = versions
        self.batcher = batcher
        self.config = config
        self.moves = moves
        self.replica_id = uuid.uuid4().hex[:16]
        key = key or os.urandom(32)
        self.service_id = service_id_of(key)
        self.leaves_within_s = 0.0
        """Above 0: streams should be renewed elsewhere within this time."""
        self._carried = CarriedMemory(StateSeal(key), state_every_s=config.state_every_s)
        self._assignment = assignment or ChannelAssignment(versions, None)
        self._shadow_log = shadow_log or EventLog(None)
        self._unary_calls = RateLimit(config.max_unary_calls_per_s)
        self._sessions = SessionTable(config, on_idle=lambda session: versions.release(session.loaded))

    async def check(
        self, *, reference: str, spec: EnvSpec, policy_version: int = 0, robot_id: str = "", service_id: str = ""
    ) -> SessionGrant:
        """What ``open`` would grant, without a session. Raises as ``open`` does."""
        self._require_unary_rate()
        self._require_mine(service_id)
        loaded, channel = await self._choose(reference, spec, policy_version, robot_id)
        try:
            return self._grant(loaded, channel, "")
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
        state: PolicyState | None = None,
        service_id: str = "",
    ) -> SessionGrant:
        """Start a session.

        Args:
            reference: ``name@channel``.
            spec: of the robot; compared with the policy's before any motion.
            robot_id: decides whether it gets the canary, and counts its sessions.
            task: for the log.
            policy_version: 0 for the channel's; a reconnecting episode names the one it began with.
            history: last K observations of an episode that reconnects, oldest first, with their executed actions.
            history_start: steps of the episode before the first of them.
            state: what this service had attached to an earlier answer; ``history`` then follows it.
            service_id: that granted the episode; empty for a new one.

        Raises:
            ContractMismatch: robot and policy differ; lists every difference.
            NotFound: policy or version is not served.
            ResourceMissing: too many sessions or versions, or sessions opened too fast.
            DataError: more history than is kept; IntegrityError: a state that this service has not sealed.
            Unreachable: the episode belongs to another service.
        """
        self._require_mine(service_id)
        with self._sessions.opening(robot_id):
            loaded, channel = await self._choose(reference, spec, policy_version, robot_id)
            try:
                memory = self._carried.begin(loaded, history, history_start, state)
                rebuilt = await self._replay(loaded, history, memory, self.config.limits.max_deadline_s)
            except BaseException:
                self.versions.release(loaded)
                raise
        session = Session(
            loaded=loaded,
            state=rebuilt,
            robot_id=robot_id,
            rate=RateLimit(self.config.max_observations_per_s),
            num_steps=(state.num_steps if state else history_start) + len(history),
        )
        shadow = self._assignment.shadow(reference) if not session.num_steps else None
        if shadow is not None and shadow is not loaded and not shadow.policy.spec.differences(spec):
            session.shadow = ShadowEpisode(shadow, self.batcher)
        _log.info("%s opened %s version %d for %r", robot_id or "a robot", reference, loaded.version, task)
        return self._grant(loaded, channel, self._sessions.add(session))

    async def act(
        self,
        session_id: str,
        observation: Observation,
        *,
        observation_id: int,
        deadline_s: float,
        plan: PlanInProgress | None = None,
    ) -> ActionChunk:
        """The chunk for one observation; the session's memory moves on only where a chunk is returned.

        Args:
            plan: what the robot goes on doing meanwhile; the chunk is joined onto it.

        Raises:
            NotFound: no such session: closed, idle for too long, or of another replica.
            DeadlineExceeded: not computed in time.
            DataError: the deadline is out of bounds.
            ResourceMissing: the queue is full, or the robot asks too often.
            WorkerFailed: the policy returned actions that are not finite.
        """
        session = self._sessions.require(session_id)
        self._require_deadline(deadline_s)
        if not session.rate.take():
            raise ResourceMissing(
                f"more than {self.config.max_observations_per_s:g} observations a second in one session; ask less often"
            )
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
            session.num_steps += 1
        finally:
            session.turn.release()
        if plan is not None:
            actions = join_plan(actions, plan, session.loaded.policy.spec)
        if session.shadow is not None:
            session.shadow.see(observation, actions, deadline_s=deadline_s)
        return self._chunk(session.loaded, actions, observation_id)

    def state_due(self, session_id: str) -> PolicyState | None:
        """The memory to send along with the answer just given; None where observations rebuild it, or not yet."""
        session = self._sessions.find(session_id)
        return None if session is None else self._carried.due(session)

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
        plan: PlanInProgress | None = None,
    ) -> ActionChunk:
        """One answer without a session: the caller brings all memory. Raises as ``open`` and ``act`` do."""
        self._require_unary_rate()
        self._require_deadline(deadline_s)
        started = time.monotonic()
        loaded = await self._acquire(reference, policy_version)
        try:
            if loaded.policy.spec.digest != spec_digest:
                raise ContractMismatch(
                    f"spec digest {spec_digest[:12]!r} is not the policy's {loaded.policy.spec.digest[:12]!r}; "
                    "call OpenSession with the whole spec, it lists every difference"
                )
            memory = self._carried.begin(loaded, history, history_start)
            state = await self._replay(loaded, history, memory, deadline_s)
            remaining = deadline_s - (time.monotonic() - started)
            actions, _ = await self._advance(loaded, observation, state, remaining)
            if plan is not None:
                actions = join_plan(actions, plan, loaded.policy.spec)
            return self._chunk(loaded, actions, observation_id)
        finally:
            self.versions.release(loaded)

    async def close(self, session_id: str, *, outcome: Outcome | None = None, episode_id: str = "") -> None:
        """End a session; a second time does nothing.

        Args:
            outcome: of the episode, where it ended with the session; canaries are judged by it.
        """
        session = self._sessions.pop(session_id)
        if session is None:
            return
        loaded = session.loaded
        self.versions.release(loaded)
        if outcome is not None:
            self._assignment.record(loaded.name, loaded.version, episode_id, outcome)
        if session.shadow is not None:
            names = {"name": loaded.name, "version": loaded.version, "episode_id": episode_id}
            session.shadow.finish(self._shadow_log, robot_id=session.robot_id, **names)

    def leave(self, *, within_s: float) -> None:
        """Ask every robot, with its next answer, to renew its stream elsewhere."""
        self.leaves_within_s = within_s

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

    def contract_of(self, reference: str) -> tuple[EnvSpec, int]:
        """Spec and horizon of what new episodes get: a wire message is checked against them before it is decoded."""
        loaded = self.versions.acquire(reference)
        self.versions.release(loaded)
        return loaded.policy.spec, loaded.policy.horizon

    def health(self) -> ServiceHealth:
        return ServiceHealth(
            loaded=self.versions.sessions(),
            num_sessions=len(self._sessions),
            problems=self.versions.problems() + self._assignment.problems(),
            replica_id=self.replica_id,
        )

    def shut_down(self) -> None:
        """Stop following and computing; open sessions get Unreachable."""
        self._assignment.close()
        self.batcher.close()
        self.versions.close()

    async def _acquire(self, reference: str, policy_version: int) -> LoadedPolicy:
        if self.versions.is_loaded(reference, policy_version):
            return self.versions.acquire(reference, policy_version)
        # Loading a pinned version takes seconds; the other robots' streams go on meanwhile.
        return await asyncio.get_running_loop().run_in_executor(None, self.versions.acquire, reference, policy_version)

    async def _choose(
        self, reference: str, spec: EnvSpec, policy_version: int, robot_id: str
    ) -> tuple[LoadedPolicy, str]:
        """The version for a session, acquired, and the channel it comes from."""
        version, channel = policy_version, reference.partition("@")[2]
        if not policy_version:
            version, channel = self._assignment.choose(reference, robot_id)
        loaded = await self._acquire(reference, version)
        if channel == CANARY and loaded.policy.spec.differences(spec):
            # A canary for other robots is no reason to stop this one.
            self.versions.release(loaded)
            loaded, channel = await self._acquire(reference, 0), reference.partition("@")[2]
        try:
            loaded.policy.spec.require_match(spec)
        except BaseException:
            self.versions.release(loaded)
            raise
        return loaded, channel

    async def _replay(
        self, loaded: LoadedPolicy, history: Sequence[Observation], memory: Any, deadline_s: float
    ) -> Any:
        deadline = time.monotonic() + deadline_s
        for observation in history:
            _, memory = await self._advance(loaded, observation, memory, deadline - time.monotonic())
        return memory

    async def _advance(
        self, loaded: LoadedPolicy, observation: Observation, state: Any, deadline_s: float
    ) -> tuple[Array, Any]:
        actions, state = await self.batcher.submit(loaded.policy, observation, state, deadline_s=deadline_s)
        if not np.isfinite(actions).all():
            raise WorkerFailed(
                f"version {loaded.version} of {loaded.name} returned actions that are not finite; roll it back"
            )
        return actions, state

    def _require_unary_rate(self) -> None:
        if not self._unary_calls.take():
            raise ResourceMissing(
                f"more than {self.config.max_unary_calls_per_s:g} calls a second without a session; drive robots by "
                "Control"
            )

    def _chunk(self, loaded: LoadedPolicy, actions: Array, observation_id: int) -> ActionChunk:
        return ActionChunk(
            actions=actions,
            policy_version=loaded.version,
            observation_id=observation_id,
            valid_for_ms=1000.0 * loaded.policy.horizon / loaded.policy.spec.control_hz + self.config.grace_ms,
            fallback=self.config.fallback,
        )

    def _grant(self, loaded: LoadedPolicy, channel: str, session_id: str) -> SessionGrant:
        return SessionGrant(
            policy_version=loaded.version,
            horizon=loaded.policy.horizon,
            context_steps=self._carried.context_steps(loaded),
            limits=self.config.limits,
            spec_digest=loaded.policy.spec.digest,
            session_id=session_id,
            service_id=self.service_id,
            channel=channel,
        )

    def _require_mine(self, service_id: str) -> None:
        if service_id and service_id != self.service_id:
            raise Unreachable(
                f"service {self.service_id} answers here, and the episode belongs to {service_id[:64]!r}; another "
                "fleet shares the address. Try again until the right one answers, or start a new episode"
            )

    def _require_deadline(self, deadline_s: float) -> None:
        longest = self.config.limits.max_deadline_s
        if not 0 < deadline_s <= longest:
            raise DataError(f"deadline {deadline_s} s must be above 0 and at most {longest} s")
