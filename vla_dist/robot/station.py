"""Everything a robot runs to collect: its spool, its uploads and the loop over its assignments."""

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vla_dist.core.errors import ConfigError, Unreachable, VlaDistError, WaitTimeout
from vla_dist.core.protocols import RobotEnv
from vla_dist.core.types import Metrics, Source
from vla_dist.protocol.fleet_records import Assignment, NextTask
from vla_dist.robot.client import PolicyClient
from vla_dist.robot.collector import Actor, Collector, CollectorConfig
from vla_dist.robot.fleet_client import FleetClient
from vla_dist.robot.operator import Operator
from vla_dist.robot.recorded_robot import RecordedRobot
from vla_dist.robot.recorder import RecorderConfig, RobotRecorder
from vla_dist.robot.spool import Spool, SpoolConfig
from vla_dist.robot.tls import TlsFiles
from vla_dist.robot.uploader import SpoolUploader, UploadConfig

_log = logging.getLogger(__name__)

_RETRY_PAUSE_S = 0.5
_SAY_EVERY_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StationConfig:
    """One robot and its server."""

    server: str
    """``host:port`` of the fleet's service."""
    robot_id: str
    spool: Path
    """Folder on a disk of the robot's own."""
    policy_server: str = ""
    """``host:port`` where policies are served; empty: ``server``."""
    token: str = ""
    tls: TlsFiles | None = None
    """Certificates, where a TLS front stands before the servers."""
    control_hz: float | None = None
    """None: as fast as the robot steps, for simulators."""
    segment_steps: int = 32
    jpeg_quality: int = 90
    tasks: tuple[str, ...] = ()
    """That it can do; empty: all of the driver's."""
    serves_policies: bool = True
    """Whether it takes assignments that a served policy acts on."""
    spool_config: SpoolConfig = field(default_factory=SpoolConfig)
    upload: UploadConfig = field(default_factory=UploadConfig)
    flush_timeout_s: float = 60.0
    """How long the end waits for the server to have everything; the rest stays in the spool."""


@contextlib.contextmanager
def open_station(
    env: RobotEnv,
    config: StationConfig,
    *,
    actors: Mapping[Source, Actor] | None = None,
    operator: Operator | None = None,
    ask: Callable[[], NextTask] | None = None,
) -> Iterator[Collector]:
    """A robot ready to be stepped; at the end of the block its recording is closed and its connections are.

    Args:
        env: the robot; stays the caller's.
        actors: who acts where no served policy does.
        operator: may take over at any step.
        ask: gives the assignments; None: the server does.

    Raises:
        ResourceMissing: the spool cannot be opened, or a camera needs an encoder that is missing.
    """
    with contextlib.ExitStack() as stack:
        spool = stack.enter_context(contextlib.closing(Spool(config.spool, config.spool_config)))
        if spool.recovered:
            _log.warning("%d episodes that were cut off are kept as partial ones", len(spool.recovered))
        client = stack.enter_context(_connect(config, config.server))
        policies = None
        if config.serves_policies:
            policies = client
            if config.policy_server:
                policies = stack.enter_context(_connect(config, config.policy_server))
        fleet = FleetClient(client, robot_id=config.robot_id, spool_id=spool.spool_id)
        recorder = RobotRecorder(
            spool,
            env.spec,
            RecorderConfig(
                robot_id=config.robot_id,
                segment_steps=config.segment_steps,
                jpeg_quality=config.jpeg_quality,
                checks_rate=config.control_hz is not None,
            ),
        )
        uploader = stack.enter_context(contextlib.closing(SpoolUploader(fleet, spool, config.upload)))
        collector = Collector(
            RecordedRobot(env, recorder, operator=operator),
            spool,
            uploader,
            fleet,
            CollectorConfig(tasks=config.tasks, control_hz=config.control_hz),
            actors=actors or {},
            policies=policies,
            ask=ask,
        )
        stack.enter_context(contextlib.closing(collector))
        yield collector
        collector.close()
        try:
            uploader.flush(timeout_s=config.flush_timeout_s)
        except WaitTimeout as error:
            _log.warning("%s", error)
        # The last word: whoever waits for this robot learns what it still holds.
        with contextlib.suppress(VlaDistError):
            fleet.heartbeat(spool.metrics())


def _connect(config: StationConfig, address: str) -> PolicyClient:
    return PolicyClient(address, token=config.token or None, tls=config.tls)


def run_station(
    collector: Collector, *, stop: threading.Event, on_metrics: Callable[[Metrics], None] = lambda _: None
) -> None:
    """Step until the server drains the robot or ``stop`` is set. A server that is away is waited for."""
    said_at = -_SAY_EVERY_S
    while not stop.is_set():
        try:
            metrics = collector.step()
        except (Unreachable, WaitTimeout) as error:
            if time.monotonic() - said_at >= _SAY_EVERY_S:
                said_at = time.monotonic()
                _log.warning("waiting: %s", error)
            stop.wait(_RETRY_PAUSE_S)
            continue
        on_metrics(metrics)
        if metrics.get("done"):
            return


class LocalAssignments:
    """The same task over and over, for a robot that no campaign tells what to do."""

    def __init__(
        self, *, task: str, source: Source, episodes: int, seed: int = 0, policy: str = "", instruction: str = ""
    ) -> None:
        if episodes < 1:
            raise ConfigError(f"episodes {episodes} must be at least 1")
        if source == "policy" and not policy:
            raise ConfigError("a policy is to act, and none is named; give it as name@channel")
        self._assignments = (
            Assignment(
                lease_id="", task=task, source=source, policy=policy, seed=seed + number, instruction=instruction
            )
            for number in itertools.count()
        )
        self._left = episodes

    def __call__(self) -> NextTask:
        if not self._left:
            return NextTask(command="drain", reason="all episodes are recorded")
        self._left -= 1
        return NextTask(command="continue", assignment=next(self._assignments))
