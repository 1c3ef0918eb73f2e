"""A robot that does what a campaign asks of it: one assignment after the other, until it is drained."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from vla_dist.core.errors import ConfigError, DataError, NotFound, ResourceMissing, Unreachable, VlaDistError
from vla_dist.core.types import Array, Metrics, Observation, Source
from vla_dist.protocol.fleet_records import Assignment, EpisodeRecord, NextTask
from vla_dist.protocol.records import FleetCommand
from vla_dist.robot.client import PolicyClient
from vla_dist.robot.control_loop import ControlConfig, ControlLoop
from vla_dist.robot.fleet_client import FleetClient
from vla_dist.robot.recorded_robot import RecordedRobot
from vla_dist.robot.spool import Spool
from vla_dist.robot.uploader import SpoolUploader

_log = logging.getLogger(__name__)


class Actor(Protocol):
    """Who acts where no policy is served: a scripted expert, or a person."""

    def begin(self, *, task: str, seed: int) -> None:
        """Once the robot has been reset: some experts look at what lies there."""
        ...

    def act(self, observation: Observation) -> tuple[Array, Array | None]:
        """The (A,) action to execute, and the one to imitate where it is known."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectorConfig:
    """How a robot works on a campaign."""

    tasks: tuple[str, ...] = ()
    """That it can do; empty: all of the robot's."""
    control_hz: float | None = None
    """Steps a second; None: as fast as the robot steps, for simulators."""
    heartbeat_s: float = 5.0
    max_wait_s: float = 5.0
    """Longest sleep in one step, so that whoever runs it can stop it."""
    failure_pause_s: float = 0.5
    """After an assignment that a fault ended; doubles with each one on end, up to ``max_wait_s``."""

    def __post_init__(self) -> None:
        if self.control_hz is not None and self.control_hz <= 0:
            raise ConfigError(f"control_hz {self.control_hz} must be positive, or None")
        if self.heartbeat_s <= 0 or self.max_wait_s <= 0 or self.failure_pause_s <= 0:
            raise ConfigError(
                f"heartbeat_s {self.heartbeat_s}, max_wait_s {self.max_wait_s} and failure_pause_s "
                f"{self.failure_pause_s} must be positive"
            )


class Collector:
    """A core Worker: one ``step`` asks for an assignment and records it. Owns nothing it is given."""

    def __init__(
        self,
        robot: RecordedRobot,
        spool: Spool,
        uploader: SpoolUploader,
        fleet: FleetClient,
        config: CollectorConfig,
        *,
        actors: Mapping[Source, Actor],
        policies: PolicyClient | None = None,
        ask: Callable[[], NextTask] | None = None,
    ) -> None:
        """
        Args:
            ask: gives the assignments; None: the server does.
            actors: who acts for sources other than a served policy.
            policies: where policies are served; None: this robot takes no assignment of source policy, unless an actor
                does.
        """
        self._robot = robot
        self._spool = spool
        self._uploader = uploader
        self._fleet = fleet
        self._config = config
        self._actors = dict(actors)
        self._policies = policies
        self._tasks = tuple(config.tasks or robot.tasks)
        self._ask = ask or self._ask_server
        self._totals: dict[str, float] = {"episodes": 0, "successes": 0, "steps": 0, "partial": 0, "faults": 0}
        self._faults_on_end = 0
        self._pulse = Pulse(fleet, self._counters, period_s=config.heartbeat_s)

    @property
    def sources(self) -> tuple[Source, ...]:
        served: tuple[Source, ...] = ("policy",) if self._policies is not None else ()
        return tuple(dict.fromkeys([*self._actors, *served]))

    def step(self) -> Metrics:
        """One episode, or a wait; ``done`` once the server has drained this robot and has all that it recorded.

        Raises:
            Unreachable: no server; call again. What is recorded stays in the spool.
            Unauthorised: no token, or another robot goes by this one's id.
        """
        try:
            self._spool.require_room()
        except ResourceMissing as error:
            return self._waited(str(error))
        answer = self._ask()
        if answer.command != "continue":
            _log.info("no more episodes: %s", answer.reason or answer.command)
            self._uploader.flush(timeout_s=self._config.max_wait_s)
            return {**self._metrics(), "done": 1.0}
        if answer.assignment is None:
            return self._waited(answer.reason, answer.wait_s)
        self._record(answer.assignment)
        return self._metrics()

    def close(self) -> None:
        """End the heartbeat, and the recording that is open."""
        self._pulse.close()
        self._robot.close()

    def _ask_server(self) -> NextTask:
        if self._pulse.command != "continue":
            return NextTask(command=self._pulse.command)
        return self._fleet.next_task(tasks=self._tasks, sources=self.sources)

    def _record(self, assignment: Assignment) -> None:
        self._robot.prepare(source=assignment.source, lease_id=assignment.lease_id)
        self._pulse.lease_id = assignment.lease_id
        lost = ""
        try:
            if assignment.source in self._actors:
                self._run(self._actors[assignment.source], assignment)
            else:
                lost = self._run_policy(assignment)
        except (Unreachable, DataError, ResourceMissing) as error:
            lost = str(error)
            _log.error("assignment %s (%s) ended early: %s", assignment.lease_id, assignment.task, error)
        finally:
            record = self._finish(lost)
            self._pulse.lease_id = ""
        if record is not None:
            self._totals["episodes"] += 1
            self._totals["steps"] += record.num_steps
            self._totals["successes"] += record.success
            self._totals["partial"] += bool(record.partial)
        elif assignment.lease_id:
            self._give_back(assignment.lease_id)
        self._faults_on_end = self._faults_on_end + 1 if lost else 0
        if lost:
            # A robot with a broken camera must not take one assignment after the other from those that work.
            self._totals["faults"] += 1
            pause_s = self._config.failure_pause_s * 2.0 ** min(self._faults_on_end - 1, 10)
            time.sleep(min(self._config.max_wait_s, pause_s))

    def _give_back(self, lease_id: str) -> None:
        """Nothing was recorded for it, so that another robot may have it now and not when the lease has expired."""
        try:
            self._fleet.heartbeat(self._counters(), returned_lease_id=lease_id)
        except VlaDistError as error:
            _log.debug("lease %s expires by itself: %s", lease_id, error)

    def _finish(self, lost: str) -> EpisodeRecord | None:
        try:
            record = self._robot.finish(lost=lost)
        except VlaDistError as error:
            _log.error("an episode could not be closed: %s", error)
            return None
        if record is not None:
            _log.info("closed episode %s: %d steps, %s", record.episode_id, record.num_steps, record.content_sha256)
        return record

    def _run(self, actor: Actor, assignment: Assignment) -> None:
        robot = self._robot
        step = robot.reset(seed=assignment.seed, task=assignment.task, instruction=assignment.instruction or None)
        actor.begin(task=assignment.task, seed=assignment.seed)
        period_s = 0.0 if self._config.control_hz is None else 1.0 / self._config.control_hz
        due = time.monotonic()
        while not step.is_last and self._pulse.command != "stop":
            action, target = actor.act(step.observation)
            robot.teach(target)
            step = robot.step(action)
            due = max(due + period_s, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))

    def _run_policy(self, assignment: Assignment) -> str:
        """Returns why the episode was lost; empty where it was not."""
        if self._policies is None or not assignment.policy:
            raise NotFound(f"the assignment names policy {assignment.policy!r}, and this robot is told of no server")
        control = ControlConfig(
            policy=assignment.policy,
            robot_id=self._fleet.claim.robot_id,
            control_hz=self._config.control_hz,
            waits=self._config.control_hz is None,
        )
        sessions: Any = _SessionsSeen(self._policies, self._robot)
        report = ControlLoop(self._robot, sessions, control).run_episode(
            seed=assignment.seed, task=assignment.task, instruction=assignment.instruction or None
        )
        return report.lost

    def _waited(self, reason: str, wait_s: float = 1.0) -> Metrics:
        if reason:
            _log.info("nothing to record now: %s", reason)
        time.sleep(max(0.05, min(wait_s, self._config.max_wait_s)))
        return {**self._metrics(), "waited": 1.0}

    def _metrics(self) -> Metrics:
        return {**self._totals, **self._uploader.metrics(), **self._spool.metrics()}

    def _counters(self) -> Metrics:
        return self._metrics()


class Pulse:
    """Heartbeats in the background, which renew the lease and bring the server's command."""

    def __init__(self, fleet: FleetClient, counters: Any, *, period_s: float) -> None:
        self._fleet = fleet
        self._counters = counters
        self._period_s = period_s
        self._closed = threading.Event()
        self.lease_id = ""
        self.command: FleetCommand = "continue"
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._thread.start()

    def close(self, *, timeout_s: float = 5.0) -> None:
        self._closed.set()
        self._thread.join(timeout_s)

    def _beat(self) -> None:
        while not self._closed.wait(self._period_s):
            try:
                self.command = self._fleet.heartbeat(self._counters(), lease_id=self.lease_id)
            except VlaDistError as error:
                # The uploader and next_task say it to people; a robot does not stop for a lost heartbeat.
                _log.debug("no heartbeat: %s", error)


class _SessionsSeen:
    """A PolicyClient's sessions, each of which tells the recording its version."""

    def __init__(self, client: PolicyClient, robot: RecordedRobot) -> None:
        self._client = client
        self._robot = robot

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def open_session(self, *arguments: Any, **options: Any) -> Any:
        session = self._client.open_session(*arguments, **options)
        self._robot.set_policy_version(session.policy_version)
        return session
