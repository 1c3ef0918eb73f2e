"""``PolicyService`` as gRPC sees it: messages in, messages out, errors as status codes with their whole sentence."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

from vla_dist.core.errors import (
    ContractMismatch,
    DataError,
    DeadlineExceeded,
    ResourceMissing,
    Unauthorised,
    Unreachable,
    VlaDistError,
)
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import ActionChunk
from vla_dist.protocol.conversion import (
    decode_goodbye,
    decode_history,
    decode_observation,
    decode_plan,
    decode_request,
    encode_chunk,
    encode_grant,
    encode_spec,
)
from vla_dist.protocol.records import PolicyState, SessionGrant
from vla_dist.protocol.status import status_of
from vla_dist.protocol.v1 import policy_pb2
from vla_dist.serving.authorisation import Caller, TokenCheck
from vla_dist.serving.calls import CallContext, fail_call, note_refusal
from vla_dist.serving.event_log import EventLog
from vla_dist.serving.service import PolicyService

M = TypeVar("M")

_REFUSALS: tuple[tuple[type[VlaDistError], policy_pb2.RefusalReason], ...] = (
    (DeadlineExceeded, policy_pb2.REFUSAL_REASON_LATE),
    (DataError, policy_pb2.REFUSAL_REASON_INVALID),
    (ResourceMissing, policy_pb2.REFUSAL_REASON_OVERLOADED),
)


_AUDITED = (Unauthorised, ContractMismatch, ResourceMissing)


class PolicyServicer:
    """``vla_dist.v1.PolicyService`` over one PolicyService.

    Args:
        audit: where refusals go; None: the process's log.
    """

    def __init__(self, service: PolicyService, tokens: TokenCheck, *, audit: EventLog | None = None) -> None:
        self._service = service
        self._policy_tokens = tokens
        self._audit = audit or EventLog(None)

    async def OpenSession(  # noqa: N802
        self, request: policy_pb2.OpenSessionRequest, grpc_context: CallContext
    ) -> policy_pb2.OpenSessionResponse:
        try:
            caller = self._policy_tokens.require(grpc_context)
            caller.require_robot(request.robot_id)
            asked = decode_request(request)
            grant = await self._service.check(
                reference=asked.policy,
                spec=asked.spec,
                policy_version=asked.policy_version,
                robot_id=asked.robot_id,
                service_id=asked.service_id,
            )
            return encode_grant(grant)
        except Exception as error:  # noqa: BLE001 - the edge: every error becomes a status
            return self._fail(grpc_context, error, policy_pb2.OpenSessionResponse)

    async def Act(  # noqa: N802
        self, request: policy_pb2.ActRequest, grpc_context: CallContext
    ) -> policy_pb2.ActResponse:
        try:
            self._policy_tokens.require(grpc_context)
            return policy_pb2.ActResponse(chunk=encode_chunk(await self._act_once(request)))
        except Exception as error:  # noqa: BLE001 - the edge: every error becomes a status
            return self._fail(grpc_context, error, policy_pb2.ActResponse)

    async def Control(  # noqa: N802
        self, request_iterator: AsyncIterator[policy_pb2.ControlRequest], grpc_context: CallContext
    ) -> AsyncIterator[policy_pb2.ControlResponse]:
        """One robot, one episode. The session ends with the stream, however the stream ends."""
        session_id, ended = "", {}
        try:
            caller = self._policy_tokens.require(grpc_context)
            first = await self._read(request_iterator)
            if first is None:
                return
            if first.WhichOneof("message") != "open":
                raise DataError(f"the first message is {first.WhichOneof('message')!r}, expected 'open'")
            grant, spec = await self._open(first.open, caller)
            session_id = grant.session_id
            yield policy_pb2.ControlResponse(opened=encode_grant(grant))
            newest_id = -1
            while (request := await self._read(request_iterator)) is not None:
                kind = request.WhichOneof("message")
                if kind == "open" and request.open == first.open:
                    continue  # what comes twice from a network counts once
                if kind == "goodbye":
                    outcome, episode_id = decode_goodbye(request.goodbye)
                    ended = {"outcome": outcome, "episode_id": episode_id}
                    return
                if kind != "observation":
                    raise DataError(f"the message is {kind!r}, expected 'observation' or 'goodbye'")
                if request.observation.observation_id <= newest_id:
                    continue
                newest_id = request.observation.observation_id
                yield await self._answer(session_id, request.observation, spec, grant.horizon)
        except Exception as error:  # noqa: BLE001 - the edge: every error becomes a status
            self._fail(grpc_context, error, policy_pb2.ControlResponse)
        finally:
            await self._service.close(session_id, **ended)

    async def ListPolicies(  # noqa: N802
        self, request: policy_pb2.ListPoliciesRequest, grpc_context: CallContext
    ) -> policy_pb2.ListPoliciesResponse:
        try:
            self._policy_tokens.require(grpc_context, role="operator")
            policies = await asyncio.get_running_loop().run_in_executor(None, self._service.policies)
            response = policy_pb2.ListPoliciesResponse()
            for policy in policies:
                entry = response.policies.add(policy=policy.policy, current_version=policy.current_version)
                for version in policy.versions:
                    entry.versions.add(
                        version=version.version,
                        parent=version.parent,
                        spec=encode_spec(version.spec),
                        horizon=version.horizon,
                        loaded=version.loaded,
                    )
            return response
        except Exception as error:  # noqa: BLE001 - the edge: every error becomes a status
            return self._fail(grpc_context, error, policy_pb2.ListPoliciesResponse)

    async def CheckHealth(  # noqa: N802
        self, request: policy_pb2.CheckHealthRequest, grpc_context: CallContext
    ) -> policy_pb2.CheckHealthResponse:
        try:
            self._policy_tokens.require(grpc_context)
            health = self._service.health()
            return policy_pb2.CheckHealthResponse(
                loaded=[
                    policy_pb2.LoadedVersion(name=name, version=version, num_sessions=num_sessions)
                    for (name, version), num_sessions in health.loaded.items()
                ],
                num_sessions=health.num_sessions,
                problems=health.problems,
                replica_id=health.replica_id,
            )
        except Exception as error:  # noqa: BLE001 - the edge: every error becomes a status
            return self._fail(grpc_context, error, policy_pb2.CheckHealthResponse)

    def _fail(self, context: CallContext, error: Exception, response: Callable[..., M]) -> M:
        if isinstance(error, _AUDITED):
            note_refusal(self._audit, context, error)
        return fail_call(context, error, response)

    async def _open(self, message: policy_pb2.ControlOpen, caller: Caller) -> tuple[SessionGrant, EnvSpec]:
        caller.require_robot(message.session.robot_id)
        asked = decode_request(message.session)
        version, history = asked.policy_version, []
        if message.history:
            # The contract comes first: it says what the arrays of the history must look like.
            grant = await self._service.check(
                reference=asked.policy,
                spec=asked.spec,
                policy_version=version,
                robot_id=asked.robot_id,
                service_id=asked.service_id,
            )
            version = grant.policy_version
            history = decode_history(
                message.history,
                asked.spec,
                context_steps=grant.context_steps,
                max_instruction_bytes=grant.limits.max_instruction_bytes,
            )
        grant = await self._service.open(
            reference=asked.policy,
            spec=asked.spec,
            robot_id=asked.robot_id,
            task=asked.task,
            policy_version=version,
            history=history,
            history_start=message.history_start,
            state=PolicyState(num_steps=message.state.num_steps, sealed=message.state.sealed)
            if message.HasField("state")
            else None,
            service_id=asked.service_id,
        )
        return grant, asked.spec

    async def _answer(
        self, session_id: str, message: policy_pb2.ControlObservation, spec: EnvSpec, horizon: int
    ) -> policy_pb2.ControlResponse:
        try:
            observation = decode_observation(
                message.observation, spec, max_instruction_bytes=self._service.config.limits.max_instruction_bytes
            )
            chunk = await self._service.act(
                session_id,
                observation,
                observation_id=message.observation_id,
                deadline_s=message.deadline_ms / 1000.0,
                plan=decode_plan(message.plan, spec, horizon=horizon) if message.HasField("plan") else None,
            )
            state = self._service.state_due(session_id)
            return policy_pb2.ControlResponse(
                chunk=encode_chunk(chunk),
                state=policy_pb2.PolicyState(num_steps=state.num_steps, sealed=state.sealed) if state else None,
                renew_within_s=self._service.leaves_within_s,
            )
        except VlaDistError as error:
            reason = next((reason for kind, reason in _REFUSALS if isinstance(error, kind)), None)
            if reason is None:
                raise
            return policy_pb2.ControlResponse(
                refusal=policy_pb2.ControlRefusal(
                    observation_id=message.observation_id, reason=reason, detail=status_of(error)[1]
                )
            )

    async def _act_once(self, request: policy_pb2.ActRequest) -> ActionChunk:
        limits = self._service.config.limits
        spec, horizon = self._service.contract_of(request.policy)
        history = decode_history(
            request.history,
            spec,
            context_steps=len(request.history),  # the service compares the number with the version's context
            max_instruction_bytes=limits.max_instruction_bytes,
        )
        return await self._service.act_once(
            reference=request.policy,
            policy_version=request.policy_version,
            spec_digest=request.spec_digest,
            history=history,
            history_start=request.history_start,
            observation=decode_observation(
                request.observation, spec, max_instruction_bytes=limits.max_instruction_bytes
            ),
            observation_id=request.observation_id,
            deadline_s=request.deadline_ms / 1000.0,
            plan=decode_plan(request.plan, spec, horizon=horizon) if request.HasField("plan") else None,
        )

    async def _read(self, requests: AsyncIterator[policy_pb2.ControlRequest]) -> policy_pb2.ControlRequest | None:
        """The next message; None at the end. A robot that vanished without a word is noticed only by its silence."""
        idle_s = self._service.config.limits.idle_timeout_s
        try:
            return await asyncio.wait_for(requests.__anext__(), idle_s)
        except StopAsyncIteration:
            return None
        except asyncio.TimeoutError as error:
            raise Unreachable(f"the stream was silent for {idle_s:g} s and is closed; reconnect to go on") from error
