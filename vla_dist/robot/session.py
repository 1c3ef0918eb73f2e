"""One episode's session with a policy server. It survives the server, and leaves a stream before it is cut."""

import itertools
import random
import threading
import time
from dataclasses import replace
from types import TracebackType

import grpc

from vla_dist.core.errors import ConfigError, DataError, DeadlineExceeded, Unreachable, VlaDistError
from vla_dist.core.types import ActionChunk, Metrics, Observation
from vla_dist.protocol.conversion import (
    decode_chunk,
    decode_grant,
    encode_goodbye,
    encode_observation,
    encode_plan,
    encode_request,
)
from vla_dist.protocol.records import Outcome, PlanInProgress, SessionGrant, SessionRequest
from vla_dist.protocol.status import RETRYABLE_CODES
from vla_dist.protocol.v1 import policy_pb2
from vla_dist.robot.control_calls import ControlCalls
from vla_dist.robot.episode_memory import EpisodeMemory
from vla_dist.robot.pending_answers import Answer, PendingAnswers
from vla_dist.robot.reconnect_config import ReconnectConfig
from vla_dist.robot.session_counts import SessionCounts
from vla_dist.robot.stream import ControlStream

_RENEWAL_RETRY_S = 5.0
_REPEAT_DEADLINE_S = 5.0


class Session:
    """Observations to chunks over one Control stream; not for two threads at once.

    ::

        with client.open_session(spec, policy="demo@stable", robot_id="arm-3", task="drawer-open") as session:
            chunk = session.act(observation, deadline_s=0.1)

    A break of the stream is no error by itself: ``act`` reopens it on the same version, gives the server the last K
    answered observations (and the last state, where the policy remembers more), and asks again, all within its
    deadline. An answer that comes after its deadline is counted and dropped, never taken for the next one.

    Args:
        service_id: the only service to accept; empty: the first that grants a session.
    """

    def __init__(
        self,
        calls: ControlCalls,
        request: SessionRequest,
        *,
        address: str,
        timeout_s: float,
        config: ReconnectConfig,
        service_id: str = "",
    ) -> None:
        self.request = replace(request, service_id=service_id)
        self._calls = calls
        self._address = address
        self._config = config
        self._changed = threading.Condition()
        self._stream: ControlStream | None = None
        self._grant: SessionGrant | None = None
        self._memory = EpisodeMemory()
        self._renewal: ControlStream | None = None
        """The next stream, while it is being opened beside the one in use."""
        self._renewal_steps = 0
        """What the next stream was told of the episode."""
        self._renew_at = float("inf")
        self._left: ControlStream | None = None
        self._pending = PendingAnswers()
        self._ids = itertools.count()
        self._outage_since: float | None = None
        self._pause_s = config.first_pause_s
        self._attempt_since = 0.0
        self._closed = False
        self._counts = SessionCounts()
        self._open_first(timeout_s)

    @property
    def grant(self) -> SessionGrant:
        """What the server granted; the version stays the same through every reconnect."""
        if self._grant is None:
            raise Unreachable(f"no session with {self._address} yet; open one first")
        return self._grant

    @property
    def policy_version(self) -> int:
        return self.grant.policy_version

    @property
    def latencies_s(self) -> list[float]:
        """Of the last 10,000 calls that ended with a chunk, by this machine's monotonic clock."""
        return list(self._counts.latencies_s)

    def act(self, observation: Observation, *, deadline_s: float, plan: PlanInProgress | None = None) -> ActionChunk:
        """The chunk for one observation.

        Blocking: at most ``deadline_s``, reconnects included.

        Args:
            plan: what the robot goes on doing meanwhile; the chunk is joined onto it.

        Raises:
            DeadlineExceeded: no chunk in time; the next call may go well.
            Unreachable: the outage has lasted longer than its budget; the episode is lost.
            DataError: the server refused the observation.
            ContractMismatch, NotFound, Unauthorised: the server that came back does not serve this robot.
        """
        self._counts.calls += 1
        started = time.monotonic()
        deadline = started + deadline_s
        message = policy_pb2.ControlObservation(
            observation=encode_observation(observation),
            plan=None if plan is None else encode_plan(plan),
        )
        try:
            if self._closed:
                raise ConfigError("the session is closed; open another one")
            chunk = self._ask(message, deadline)
        except BaseException:
            self._counts.failures += 1
            raise
        self._counts.latencies_s.append(time.monotonic() - started)
        return chunk

    def reconnect(self) -> None:
        """Leave the stream as if it had broken: the next ``act`` opens another, and the memory is rebuilt."""
        if self._stream is not None:
            self._stream.cancel()
            self._stream = None

    def close(self, *, timeout_s: float = 1.0, outcome: Outcome | None = None, episode_id: str = "") -> None:
        """Say goodbye. A second time does nothing.

        Args:
            outcome: of the episode, where it has ended; canaries are judged by it.
            episode_id: its name, under which the outcome is counted once.
        """
        if self._closed:
            return
        self._closed = True
        for other in (self._renewal, self._left):
            if other is not None:
                other.cancel()
        if self._stream is not None:
            self._stream.end(timeout_s=timeout_s, goodbye=encode_goodbye(outcome, episode_id))
        self._calls.close()

    def metrics(self) -> Metrics:
        """Counts of this session. A failure is a call that ended without a chunk."""
        return self._counts.metrics()

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _open_first(self, timeout_s: float) -> None:
        try:
            self._require_stream(time.monotonic() + timeout_s, first=True)
        except DeadlineExceeded as error:
            self.close(timeout_s=0.0)
            raise Unreachable(
                f"no session from {self._address} within {timeout_s} s; check that a policy server runs there"
            ) from error
        except BaseException:
            self.close(timeout_s=0.0)
            raise

    def _ask(self, message: policy_pb2.ControlObservation, deadline: float) -> ActionChunk:
        while True:
            stream = self._require_stream(deadline)
            # Only now: what a new stream is told again comes before it, and identities grow within a stream.
            observation_id = message.observation_id = next(self._ids)
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                raise self._late(observation_id)
            with self._changed:
                self._pending.expect(observation_id, message.observation, give_up_at=deadline)
            message.deadline_ms = 1000 * min(remaining_s, self.grant.limits.max_deadline_s)
            stream.send(policy_pb2.ControlRequest(observation=message))
            with self._changed:
                self._changed.wait_for(
                    lambda: self._pending.has(observation_id) or stream.has_ended,  # noqa: B023 - used at once
                    remaining_s,
                )
                answer = self._pending.take(observation_id)
                if answer is None and not stream.has_ended:
                    self._pending.expect_nothing()
                    raise self._late(observation_id)
            if isinstance(answer, ActionChunk):
                return answer
            if answer is not None:
                raise _refused(answer)

    def _require_stream(self, deadline: float, *, first: bool = False) -> ControlStream:
        """A stream whose session is granted; opens one where needed."""
        attempt_s = self._config.attempt_s
        if first:  # One that hangs, as on a server that just ends, must leave time for another.
            attempt_s = min(attempt_s, (deadline - time.monotonic()) / 2)
        self._renew()
        while True:
            self._drop_stalled()
            stream = self._stream or self._start_stream()
            self._wait_until_open(stream, min(deadline, self._attempt_since + attempt_s))
            if stream.is_open and not stream.has_ended:
                self._pause_s = self._config.first_pause_s
                return stream
            if stream.has_ended:
                self._after_end(stream, deadline, first=first)
            elif time.monotonic() >= self._attempt_since + attempt_s:
                self._give_up_on(stream)
            self._require_budget(stream)
            if time.monotonic() >= deadline:
                raise DeadlineExceeded(f"the connection to {self._address} is being rebuilt; hold until it is")

    def _wait_until_open(self, stream: ControlStream, until: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: stream.is_open or stream.has_ended, max(0.0, until - time.monotonic()))

    def _start_stream(self) -> ControlStream:
        with self._changed:
            # What was on its way is lost; only answered observations are part of the policy's memory.
            self._pending.forget()
        self._attempt_since = time.monotonic()
        stream = self._stream = self._make_stream()
        stream.start()
        return stream

    def _make_stream(self) -> ControlStream:
        request = self.request
        if self._grant is not None:
            request = replace(request, policy_version=self._grant.policy_version, service_id=self._grant.service_id)
        with self._changed:
            opening = self._memory.opening(encode_request(request))
        return ControlStream(
            self._calls.start,
            policy_pb2.ControlRequest(open=opening),
            address=self._address,
            on_response=self._on_response,
            on_end=self._on_end,
        )

    def _renew(self) -> None:
        """Move to the next stream where it is ready, begin one where it is time; never waits."""
        renewal = self._renewal
        if renewal is not None and renewal.has_ended:
            self._renewal = None
            self._renew_at = time.monotonic() + _RENEWAL_RETRY_S
        elif renewal is not None and renewal.is_open:
            self._move_to(renewal)
        elif renewal is None and self._stream is not None and time.monotonic() >= self._renew_at:
            with self._changed:
                self._renewal_steps = self._memory.num_steps
            self._renewal = self._make_stream()
            self._renewal.start()

    def _move_to(self, renewal: ControlStream) -> None:
        with self._changed:
            missed = self._memory.since(self._renewal_steps)
            if len(missed) < self._memory.num_steps - self._renewal_steps:
                missed = None  # it took so long that the new stream's memory would have a gap
            old, self._renewal = self._stream, None
            self._pending.forget()
            self._schedule_renewal()
            if missed is not None:
                self._stream = renewal
        if missed is None:
            renewal.cancel()
            return
        for observation in missed:
            observation_id = next(self._ids)
            with self._changed:
                self._pending.repeat(observation_id)
            deadline_ms = 1000 * min(_REPEAT_DEADLINE_S, self.grant.limits.max_deadline_s)
            again = policy_pb2.ControlObservation(
                observation=observation, observation_id=observation_id, deadline_ms=deadline_ms
            )
            renewal.send(policy_pb2.ControlRequest(observation=again))
        self._counts.renewals += 1
        if self._left is not None:
            self._left.cancel()
        self._left = old
        if old is not None:
            old.leave()

    def _schedule_renewal(self) -> None:
        # Robots that began together must not renew together.
        self._renew_at = time.monotonic() + self._config.renew_every_s * random.uniform(0.9, 1.1)

    def _after_end(self, stream: ControlStream, deadline: float, *, first: bool) -> None:
        self._stream = None
        busy = stream.code is grpc.StatusCode.RESOURCE_EXHAUSTED and not first  # our dead stream may still hold a place
        retry = stream.code in RETRYABLE_CODES or stream.code is grpc.StatusCode.OK or busy
        if not retry:
            raise stream.error or Unreachable(f"the stream to {self._address} ended with {stream.code}")
        self._note_outage()
        if not stream.is_open:
            self._require_budget(stream)
            time.sleep(max(0.0, min(self._pause_s, deadline - time.monotonic())))
            self._pause_s = min(2 * self._pause_s, self._config.longest_pause_s)

    def _drop_stalled(self) -> None:
        stream = self._stream
        with self._changed:
            oldest = self._pending.oldest_give_up_at()
        if stream is not None and oldest is not None and time.monotonic() > oldest + self._config.stall_s:
            self._give_up_on(stream)

    def _give_up_on(self, stream: ControlStream) -> None:
        """Of a stream that is silent; its connection may be dead without having said so."""
        self._note_outage()
        stream.cancel()
        self._stream = None
        self._calls.use_new_connection()

    def _note_outage(self) -> None:
        if self._outage_since is None:
            self._outage_since = time.monotonic()

    def _require_budget(self, stream: ControlStream) -> None:
        if self._outage_since is not None and time.monotonic() - self._outage_since > self._config.budget_s:
            raise Unreachable(
                f"no session from {self._address} for {self._config.budget_s} s; the episode cannot go on"
            ) from stream.error

    def _on_response(self, stream: ControlStream, response: policy_pb2.ControlResponse) -> None:
        with self._changed:
            if stream is self._stream:
                self._take(stream, response)
                self._changed.notify_all()
            elif stream is self._renewal and response.WhichOneof("message") == "opened":
                self._require_same(decode_grant(response.opened))
                stream.is_open = True

    def _take(self, stream: ControlStream, response: policy_pb2.ControlResponse) -> None:
        kind = response.WhichOneof("message")
        if kind == "opened" and stream.is_open:
            return  # it came twice
        if kind == "opened":
            self._take_grant(decode_grant(response.opened))
            stream.is_open = True
            return
        answer: Answer
        if kind == "chunk":
            answer = decode_chunk(response.chunk, self.request.spec, horizon=self.grant.horizon)
            observation_id = answer.observation_id
        elif kind == "refusal":
            answer, observation_id = response.refusal, response.refusal.observation_id
        else:
            raise DataError(f"the server at {self._address} sent {kind!r}, expected an answer; update one of the two")
        if self._pending.is_repeat(observation_id):
            if kind == "refusal":
                raise Unreachable("the new stream's memory has a gap; the episode is opened once more")
            return
        if response.renew_within_s > 0:
            self._renew_at = min(self._renew_at, time.monotonic())
        message, is_awaited = self._pending.settle(observation_id, answer)
        if message is not None and kind == "chunk":
            # The server's memory moved on with it, even where the chunk came too late to be executed.
            self._memory.add(message, response.state if response.HasField("state") else None)
            self._counts.late_answers += not is_awaited

    def _take_grant(self, grant: SessionGrant) -> None:
        self._require_same(grant)
        if self._grant is not None:
            self._counts.reconnects += 1
        self._memory.keep(grant.context_steps)
        self._grant = grant
        self._outage_since = None
        self._schedule_renewal()

    def _require_same(self, grant: SessionGrant) -> None:
        """Raises where the episode would go on elsewhere: Unreachable of a stranger, who may be passed by."""
        expected = self._grant.service_id if self._grant else self.request.service_id
        if expected and grant.service_id != expected:
            raise Unreachable(
                f"service {grant.service_id!r} answered at {self._address}, expected {expected!r}: another fleet "
                "shares the address"
            )
        if self._grant is not None and grant.policy_version != self._grant.policy_version:
            raise DataError(
                f"the server reopened the episode on version {grant.policy_version}, "
                f"expected {self._grant.policy_version}"
            )

    def _on_end(self, stream: ControlStream) -> None:
        with self._changed:
            self._changed.notify_all()

    def _late(self, observation_id: int) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"no answer to observation {observation_id} from {self._address} in time; hold, and send a newer one"
        )


def _refused(refusal: policy_pb2.ControlRefusal) -> VlaDistError:
    if refusal.reason == policy_pb2.REFUSAL_REASON_INVALID:
        return DataError(refusal.detail)
    return DeadlineExceeded(refusal.detail)
