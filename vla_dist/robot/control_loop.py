"""Observe, act, execute: one robot, one episode at a time, with a dead-man between the network and the motors."""

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from vla_dist.core.errors import ConfigError, DeadlineExceeded, Unreachable
from vla_dist.core.protocols import RobotEnv
from vla_dist.core.recorder import EpisodeRecorder
from vla_dist.core.types import Array, Fallback, Observation, Segment, Step
from vla_dist.robot.client import PolicyClient
from vla_dist.robot.dead_man import DeadMan
from vla_dist.robot.plan import Plan, PlanAhead
from vla_dist.robot.session import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlConfig:
    """How one robot is driven."""

    policy: str
    """``name@channel``."""
    robot_id: str
    control_hz: float | None
    """Actions per second. None: the world waits for the policy, as a simulator does; then a chunk cannot run out of
    time and a late answer is asked for again."""
    waits: bool = False
    """At a rate: the world stands still until the policy answers, as a simulator can; the rate is then an upper bound,
    no chunk runs out of time, and a late answer is asked for again."""
    deadline_s: float = 10.0
    """Longest wait for a chunk; at a rate it is cut to one control period."""
    give_up_s: float = 30.0
    """An episode without a chunk for this long is lost, whether the server is away or always late."""
    segment_steps: int = 32
    """T of what is recorded."""
    execution: Literal["in_turn", "real_time"] = "in_turn"
    """How chunks are executed. in_turn: each to its end, then the next is asked for. real_time: the next is asked for
    while the last is executed, and joined onto it, so that the robot never stands still to wait."""
    execute_steps: int | None = None
    """Of real_time: actions of a chunk that are executed before the next is asked for; None: a quarter of it."""

    def __post_init__(self) -> None:
        if self.execution not in ("in_turn", "real_time"):
            raise ConfigError(f"execution {self.execution!r} must be 'in_turn' or 'real_time'")
        if self.execution == "real_time" and (self.control_hz is None or self.waits):
            raise ConfigError("real_time execution needs a control_hz and a world that does not wait (waits=False)")
        if self.control_hz is not None and self.control_hz <= 0:
            raise ConfigError(f"control_hz {self.control_hz} must be positive, or None for as fast as possible")
        if self.deadline_s <= 0 or self.give_up_s <= 0 or self.segment_steps < 1:
            raise ConfigError(
                f"deadline_s {self.deadline_s}, give_up_s {self.give_up_s} and segment_steps {self.segment_steps} "
                "must be positive"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeReport:
    """How an episode went."""

    episode_id: str
    policy_version: int
    num_steps: int
    success: bool
    total_reward: float
    num_fallbacks: int
    """Control periods without a valid action from the server."""
    lost: str
    """Why the episode was given up; empty where it ran to its end."""
    num_calls: int
    num_failures: int
    """Calls that ended without a chunk."""
    num_reconnects: int
    latencies_s: tuple[float, ...]
    """Of each call that brought a chunk."""


class ControlLoop:
    """Runs episodes of ``env`` with the policy behind ``client``.

    Each chunk is executed to its end, or until it has run out of time; then the next observation goes out. At a rate,
    every control period ends with a command or a fallback, whatever the network does: the wait for an answer is never
    longer than a period.

    Args:
        env: the robot or simulator.
        client: connection to the policy server; stays the caller's.
        config: rate and names.
        on_segment: takes each finished segment; must not block for longer than a period. None records nothing.
        dead_man: what to command without a valid chunk.
    """

    def __init__(
        self,
        env: RobotEnv,
        client: PolicyClient,
        config: ControlConfig,
        *,
        on_segment: Callable[[Segment], None] | None = None,
        dead_man: DeadMan | None = None,
    ) -> None:
        self._env = env
        self._client = client
        self._config = config
        self._on_segment = on_segment
        self._dead_man = dead_man or DeadMan(env.spec)

    def run_episode(
        self, *, seed: int, task: str, instruction: str | None = None, episode_id: str | None = None
    ) -> EpisodeReport:
        """One episode.

        Raises:
            ContractMismatch, NotFound, Unauthorised, ResourceMissing, Unreachable: before any motion.
        """
        step = self._env.reset(seed=seed, task=task, instruction=instruction)
        config = self._config
        with self._client.open_session(
            self._env.spec, policy=config.policy, robot_id=config.robot_id, task=task
        ) as session:
            recorder = EpisodeRecorder(
                self._env.spec,
                num_steps=config.segment_steps,
                episode_id=episode_id or uuid.uuid4().hex,
                robot_id=config.robot_id,
                task=task,
                instruction=step.observation.instruction,
                policy_version=session.policy_version,
                source="policy",
            )
            return _Episode(self._env, session, config, self._dead_man, recorder, self._on_segment).run(step)


class _Episode:
    """State of one running episode."""

    def __init__(
        self,
        env: RobotEnv,
        session: Session,
        config: ControlConfig,
        dead_man: DeadMan,
        recorder: EpisodeRecorder,
        on_segment: Callable[[Segment], None] | None,
    ) -> None:
        self._env = env
        self._session = session
        self._dead_man = dead_man
        self._recorder = recorder
        self._on_segment = on_segment
        self._period_s = None if config.control_hz is None else 1.0 / config.control_hz
        self._waits = config.waits or self._period_s is None
        self._deadline_s = config.deadline_s if self._waits else min(config.deadline_s, self._period_s or 0.0)
        self._give_up_s = config.give_up_s
        self._last_chunk_at = time.monotonic()
        self._plan: Plan | None = None
        self._last_action: Array | None = None
        self._fallback_kind: Fallback = "hold"
        self._num_fallbacks = 0
        self._ahead: PlanAhead | None = None
        if config.execution == "real_time" and self._period_s is not None:
            self._ahead = PlanAhead(session, period_s=self._period_s, execute_steps=config.execute_steps)

    def run(self, step: Step) -> EpisodeReport:
        lost = ""
        due = time.monotonic()
        while not step.is_last:
            try:
                action = self._next_action(step.observation)
            except Unreachable as error:
                lost = str(error)
                step = self._execute(self._fallback(step.observation), step)
                break
            step = self._execute(action, step)
            due = self._wait_until_due(due)
        if self._ahead is not None:
            self._ahead.close()
        if self._recorder.total_steps:
            self._emit(self._recorder.finish(success=step.success and not lost))
        if not lost:
            outcome = "success" if step.success else "failure"
            self._session.close(outcome=outcome, episode_id=self._recorder.episode_id)
        return self._report(success=step.success and not lost, lost=lost)

    def _next_action(self, observation: Observation) -> Array | None:
        if self._ahead is not None:
            return self._next_ahead(self._ahead, observation)
        plan = self._plan
        if plan is None or plan.is_used_up or not self._may_execute(plan):
            plan = self._plan = self._ask(observation)
        if plan is None:
            return self._fallback(observation)
        return plan.take()

    def _next_ahead(self, ahead: PlanAhead, observation: Observation) -> Array | None:
        plan = self._plan
        if plan is not None and not self._may_execute(plan):
            plan = None
        after = ahead.follow(plan, self._told(observation))
        if after is not None and after is not plan:
            self._last_chunk_at = time.monotonic()
            self._fallback_kind = after.chunk.fallback
        elif time.monotonic() - self._last_chunk_at > self._give_up_s:
            raise Unreachable(f"no chunk for {self._give_up_s} s; the episode is lost")
        self._plan = after
        if after is None or after.is_used_up or not self._may_execute(after):
            return self._fallback(observation)
        return after.take()

    def _told(self, observation: Observation) -> Observation:
        """What was executed may be a fallback, and the server must not believe it was its own action."""
        if observation.previous_action is not None or self._last_action is None:
            return observation
        return replace(observation, previous_action=self._last_action)

    def _ask(self, observation: Observation) -> Plan | None:
        """The chunk for this observation; None where it did not come in time for this period."""
        observation = self._told(observation)
        while True:
            sent_at = time.monotonic()
            try:
                chunk = self._session.act(observation, deadline_s=self._deadline_s)
            except DeadlineExceeded as error:
                if time.monotonic() - self._last_chunk_at > self._give_up_s:
                    raise Unreachable(f"no chunk for {self._give_up_s} s; the episode is lost") from error
                if self._waits:
                    continue
                return None
            self._last_chunk_at = time.monotonic()
            plan = Plan(chunk, sent_at)
            self._fallback_kind = chunk.fallback
            return plan if self._may_execute(plan) else None

    def _may_execute(self, plan: Plan) -> bool:
        if self._waits:
            return True
        return self._dead_man.is_valid(plan.chunk, sent_at=plan.sent_at, now=time.monotonic())

    def _fallback(self, observation: Observation) -> Array | None:
        self._num_fallbacks += 1
        return self._dead_man.action(self._fallback_kind, observation=observation, last_action=self._last_action)

    def _execute(self, action: Array | None, step: Step) -> Step:
        if action is None:
            return step
        observation, step = step.observation, self._env.step(action)
        self._last_action = action
        self._emit(self._recorder.add(observation, action=action, reward=step.reward))
        return step

    def _emit(self, segment: Segment | None) -> None:
        if segment is not None and self._on_segment is not None:
            self._on_segment(segment)

    def _wait_until_due(self, due: float) -> float:
        """End this period; a period that was overrun is not made up for."""
        if self._period_s is None:
            return due
        due = max(due + self._period_s, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))
        return due

    def _report(self, *, success: bool, lost: str) -> EpisodeReport:
        counts = self._session.metrics()
        return EpisodeReport(
            episode_id=self._recorder.episode_id,
            policy_version=self._session.policy_version,
            num_steps=self._recorder.total_steps,
            success=success,
            total_reward=self._recorder.total_reward,
            num_fallbacks=self._num_fallbacks,
            lost=lost,
            num_calls=int(counts["calls"]),
            num_failures=int(counts["failures"]),
            num_reconnects=int(counts["reconnects"]),
            latencies_s=tuple(self._session.latencies_s),
        )
