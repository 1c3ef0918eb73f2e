"""The client a robot installs: NumPy, gRPC and the standard library."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import grpc

from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import ActionChunk, Observation
from vla_dist.protocol.conversion import (
    decode_chunk,
    decode_grant,
    decode_spec,
    encode_observation,
    encode_plan,
    encode_request,
)
from vla_dist.protocol.records import (
    FleetCommand,
    PlanInProgress,
    PolicyInfo,
    ServiceHealth,
    SessionGrant,
    SessionRequest,
    VersionInfo,
)
from vla_dist.protocol.v1 import fleet_pb2, fleet_pb2_grpc, policy_pb2, policy_pb2_grpc
from vla_dist.robot.calls import call_idempotent
from vla_dist.robot.control_calls import ControlCalls
from vla_dist.robot.reconnect_config import ReconnectConfig
from vla_dist.robot.session import Session
from vla_dist.robot.tls import TlsFiles

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", 64 * 2**20),
    ("grpc.max_send_message_length", 64 * 2**20),
    # gRPC waits 1 s after the first failed connect, and up to 2 min: a robot that holds still wants to be back sooner.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 250),
    # In spite of its name the longest that one connect may take, handshake included: 20 s by default.
    ("grpc.min_reconnect_backoff_ms", 2000),
    # Clients of one process share a connection otherwise, and a proxy allows only so many streams on one.
    ("grpc.use_local_subchannel_pool", 1),
)

_COMMANDS: dict[int, FleetCommand] = {
    fleet_pb2.FLEET_COMMAND_CONTINUE: "continue",
    fleet_pb2.FLEET_COMMAND_DRAIN: "drain",
    fleet_pb2.FLEET_COMMAND_STOP: "stop",
}


class PolicyClient:
    """A connection to one policy server or fleet endpoint; safe for threads, each with its own session.

    Args:
        address: ``host:port``.
        token: bearer token, where the server wants one. Without ``tls`` it travels in clear.
        tls: certificates, where a TLS front stands before the server.
        timeout_s: of each call that is not ``Session.act``, opening a session included.
        reconnect: how a session survives its server.
        service_id: the only service to talk to, as ``vla-dist serve`` prints it; empty: the first that answers.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        tls: TlsFiles | None = None,
        timeout_s: float = 10.0,
        reconnect: ReconnectConfig | None = None,
        service_id: str = "",
    ) -> None:
        self.address = address
        self.timeout_s = timeout_s
        self.service_id = service_id
        self._reconnect = reconnect or ReconnectConfig()
        self.call_metadata: tuple[tuple[str, str], ...] = (
            () if token is None else (("authorization", f"Bearer {token}"),)
        )
        self._credentials = None if tls is None else tls.credentials()
        self.channel = self._make_channel()
        self._policies = policy_pb2_grpc.PolicyServiceStub(self.channel)
        self._fleet = fleet_pb2_grpc.FleetServiceStub(self.channel)

    def check(self, spec: EnvSpec, *, policy: str, policy_version: int = 0, robot_id: str = "") -> SessionGrant:
        """The handshake alone: what a session would get.

        Raises:
            ContractMismatch: robot and policy differ; lists every difference.
            NotFound: the policy or the version is not served.
            Unauthorised: no token, or a wrong one.
            Unreachable: no server.
        """
        request = SessionRequest(
            spec=spec, policy=policy, policy_version=policy_version, robot_id=robot_id, service_id=self.service_id
        )
        return decode_grant(self._unary(self._policies.OpenSession, encode_request(request)))

    def open_session(
        self, spec: EnvSpec, *, policy: str, robot_id: str, task: str = "", policy_version: int = 0
    ) -> Session:
        """Start an episode. Raises as ``check`` does, and ResourceMissing where the server is full."""
        request = SessionRequest(spec=spec, policy=policy, robot_id=robot_id, task=task, policy_version=policy_version)

        calls = ControlCalls(self.channel, self._make_channel, self.call_metadata)
        return Session(
            calls,
            request,
            address=self.address,
            timeout_s=self.timeout_s,
            config=self._reconnect,
            service_id=self.service_id,
        )

    def act(
        self,
        spec: EnvSpec,
        observation: Observation,
        *,
        policy: str,
        grant: SessionGrant,
        history: Sequence[Observation] = (),
        history_start: int = 0,
        observation_id: int = 0,
        deadline_s: float = 10.0,
        plan: PlanInProgress | None = None,
    ) -> ActionChunk:
        """One answer without a session: the call carries all memory. For parity checks and debugging.

        Args:
            spec: the one ``grant`` was given for.
            observation: to answer.
            policy: ``name@channel``.
            grant: from ``check``; fixes the version.
            history: earlier observations of the episode, oldest first, at most ``grant.context_steps``.
            history_start: steps of the episode before the first of them.
            observation_id: comes back in the chunk.
            deadline_s: of the computation and of the call.
            plan: what the robot goes on doing meanwhile; the chunk is joined onto it.
        """
        request = policy_pb2.ActRequest(
            policy=policy,
            policy_version=grant.policy_version,
            spec_digest=grant.spec_digest,
            history=[encode_observation(h) for h in history],
            history_start=history_start,
            observation=encode_observation(observation),
            observation_id=observation_id,
            deadline_ms=1000 * deadline_s,
            plan=None if plan is None else encode_plan(plan),
        )
        response = self._unary(self._policies.Act, request, timeout_s=deadline_s)
        return decode_chunk(response.chunk, spec, horizon=grant.horizon)

    def policies(self) -> tuple[PolicyInfo, ...]:
        """What the server follows, with all versions of each."""
        response = self._unary(self._policies.ListPolicies, policy_pb2.ListPoliciesRequest())
        return tuple(
            PolicyInfo(
                policy=entry.policy,
                current_version=entry.current_version,
                versions=tuple(
                    VersionInfo(
                        version=v.version,
                        parent=v.parent,
                        spec=decode_spec(v.spec),
                        horizon=v.horizon,
                        loaded=v.loaded,
                    )
                    for v in entry.versions
                ),
            )
            for entry in response.policies
        )

    def health(self) -> ServiceHealth:
        """Of the replica that answers."""
        response = self._unary(self._policies.CheckHealth, policy_pb2.CheckHealthRequest())
        return ServiceHealth(
            loaded={(v.name, v.version): v.num_sessions for v in response.loaded},
            num_sessions=response.num_sessions,
            problems=tuple(response.problems),
            replica_id=response.replica_id,
        )

    def heartbeat(self, robot_id: str, counters: dict[str, float]) -> FleetCommand:
        """Say that the robot lives; the answer is what it should do. An unknown command is taken for ``stop``."""
        request = fleet_pb2.HeartbeatRequest(robot_id=robot_id, counters=counters)
        return _COMMANDS.get(self._unary(self._fleet.Heartbeat, request).command, "stop")

    def close(self) -> None:
        self.channel.close()

    def _make_channel(self) -> grpc.Channel:
        if self._credentials is None:
            return grpc.insecure_channel(self.address, options=CHANNEL_OPTIONS)
        return grpc.secure_channel(self.address, self._credentials, options=CHANNEL_OPTIONS)

    def __enter__(self) -> "PolicyClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _unary(self, method: Any, request: Any, *, timeout_s: float | None = None) -> Any:
        return call_idempotent(
            method,
            request,
            timeout_s=timeout_s or self.timeout_s,
            metadata=self.call_metadata,
            address=self.address,
        )
