"""The chunk that is being executed, and how the next one is asked for while it still is."""

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from vla_dist.core.errors import ConfigError, DeadlineExceeded
from vla_dist.core.types import ActionChunk, Array, Observation
from vla_dist.protocol.records import PlanInProgress
from vla_dist.robot.session import Session

_NUM_DELAYS = 10
"""Of the last answers; the longest of them is expected of the next."""


@dataclass(slots=True)
class Plan:
    """A chunk at some point of its execution."""

    chunk: ActionChunk
    sent_at: float
    """When its observation was sent, by ``time.monotonic``."""
    next_index: int = 0

    def take(self) -> Array:
        """(A,) the next action."""
        action = self.chunk.actions[self.next_index]
        self.next_index += 1
        return action

    @property
    def num_remaining(self) -> int:
        return len(self.chunk.actions) - self.next_index

    @property
    def is_used_up(self) -> bool:
        return self.num_remaining <= 0

    def in_progress(self, *, committed_steps: int) -> PlanInProgress:
        """What remains, as it is told to the server."""
        return PlanInProgress(
            observation_id=self.chunk.observation_id,
            consumed_steps=self.next_index,
            remaining=self.chunk.actions[self.next_index :],
            committed_steps=min(committed_steps, self.num_remaining),
        )


@dataclass(slots=True)
class _Asked:
    answer: "Future[ActionChunk]"
    sent_at: float
    num_periods: int = 0
    """Control periods since the observation: the row of the answer that is due now."""


class PlanAhead:
    """Real-time chunking from the robot's side: the robot never stands still to wait for a chunk.

    While the last chunk is executed the next is computed from an observation of now. The server joins it onto what the
    robot will have done by then, and the robot goes on with the row that is due when it comes. How long that takes is
    measured in executed periods, never by comparing clocks.

    Source: Black et al. 2025, "Real-Time Execution of Action Chunking Flow Policies", algorithm 1.
    """

    def __init__(self, session: Session, *, period_s: float, execute_steps: int | None = None) -> None:
        """Args:
            period_s: of control.
            execute_steps: s, rows of a chunk executed before the next is asked for, or more where an answer takes
                longer; None: a quarter of it, so that three quarters overlap and the change is soft.

        Raises:
            ConfigError: chunks too short to be joined.
        """
        horizon = session.grant.horizon
        if horizon < 2 or not 1 <= (execute_steps or 1) < horizon:
            raise ConfigError(
                f"real-time execution needs chunks of 2 actions or more and 1 <= execute_steps < H; the policy's H is "
                f"{horizon}, execute_steps is {execute_steps}. Execute chunks one after the other, or serve a policy "
                "that predicts longer ones"
            )
        self._session = session
        self._period_s = period_s
        self._horizon = horizon
        self._execute_steps = execute_steps or max(1, horizon // 4)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="plan-ahead")
        self._asked: _Asked | None = None
        self._delays: deque[int] = deque([1], maxlen=_NUM_DELAYS)

    @property
    def expected_delay(self) -> int:
        """Periods from an observation to its chunk."""
        return min(max(self._delays), self._horizon - 1)

    def follow(self, plan: Plan | None, observation: Observation) -> Plan | None:
        """The plan for this control period; call it once in each.

        Args:
            plan: of the last period; None: none yet, or it may not be executed any more.
            observation: of now, with what was executed last.

        Raises:
            Unreachable, DataError, and what else ends a session.
        """
        if self._asked is not None:
            self._asked.num_periods += 1
            plan = self._take_answer(plan, wait_s=0.0)
        if self._asked is None and self._is_time(plan):
            self._ask(plan, observation)
            if plan is None or plan.is_used_up:
                plan = self._take_answer(plan, wait_s=0.5 * self._period_s)
        return plan

    def close(self) -> None:
        """Wait for the call that is on its way; it ends at its deadline."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _is_time(self, plan: Plan | None) -> bool:
        latest = self._horizon - 1 - self.expected_delay
        return plan is None or plan.next_index >= min(self._execute_steps, max(1, latest))

    def _ask(self, plan: Plan | None, observation: Observation) -> None:
        told = None
        if plan is not None and not plan.is_used_up:
            told = plan.in_progress(committed_steps=self.expected_delay)
        deadline_s = self._horizon * self._period_s  # nothing of a later chunk could be executed
        answer = self._thread.submit(self._session.act, observation, deadline_s=deadline_s, plan=told)
        self._asked = _Asked(answer, time.monotonic())

    def _take_answer(self, plan: Plan | None, *, wait_s: float) -> Plan | None:
        asked = self._asked
        assert asked is not None
        if not wait([asked.answer], timeout=wait_s).done:
            return plan
        self._asked = None
        try:
            chunk = asked.answer.result(0)
        except DeadlineExceeded:
            self._delays.append(self._horizon - 1)
            return plan
        self._delays.append(asked.num_periods)
        if asked.num_periods >= len(chunk.actions):
            return plan
        return Plan(chunk, asked.sent_at, next_index=asked.num_periods)
