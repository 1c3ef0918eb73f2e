"""A robot of a simulated fleet: it asks the policy service for its actions and spools what it lived through."""

import logging
import time
from dataclasses import dataclass

from vla_dist.core.errors import ConfigError, ResourceMissing
from vla_dist.core.protocols import RobotEnv
from vla_dist.core.seeding import training_seed
from vla_dist.core.types import Metrics
from vla_dist.robot.client import PolicyClient
from vla_dist.robot.control_loop import ControlConfig, ControlLoop, EpisodeReport
from vla_dist.robot.latency import LatencyHistogram
from vla_dist.robot.spool import Spool
from vla_dist.robot.spool_writer import spool_sink

_log = logging.getLogger(__name__)

_ROOM_PAUSE_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRobotConfig:
    """What one simulated robot does."""

    tasks: tuple[str, ...]
    """Run one after the other, over and over."""
    run_id: str
    """With the robot's index it names its episodes."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError("a simulated robot needs at least one task; got none")


class SimulatedRobot:
    """A core Worker: one ``step`` is one episode, spooled. Episode identities follow from (run, robot, index).

    Owns ``env``; ``client`` and ``spool`` stay the caller's.
    """

    def __init__(
        self,
        env: RobotEnv,
        client: PolicyClient,
        control: ControlConfig,
        config: SimulatedRobotConfig,
        *,
        robot_index: int,
        spool: Spool | None = None,
    ) -> None:
        """``spool`` None: nothing is kept."""
        self._env = env
        self._config = config
        self._spool = spool
        self._robot_index = robot_index
        on_segment = None if spool is None else spool_sink(spool)
        self._loop = ControlLoop(env, client, control, on_segment=on_segment)
        self._next = 0
        self._totals = {
            "episodes": 0.0,
            "successes": 0.0,
            "steps": 0.0,
            "lost_episodes": 0.0,
            "fallbacks": 0.0,
            "calls": 0.0,
            "failed_calls": 0.0,
            "reconnects": 0.0,
        }
        self._latency = LatencyHistogram()
        self.last_report: EpisodeReport | None = None

    def step(self) -> Metrics:
        """One episode, or a wait for room in the spool.

        Raises:
            Unreachable: no server at the start of the episode; call again, the same episode runs then.
        """
        try:
            if self._spool is not None:
                self._spool.require_room()
        except ResourceMissing as error:
            _log.warning("no new episode: %s", error)
            time.sleep(_ROOM_PAUSE_S)
            return {**self._totals, **self._latency.to_metrics(), "waited": 1.0}
        self._run_next()
        return {**self._totals, **self._latency.to_metrics(), "waited": 0.0}

    def close(self) -> None:
        self._env.close()

    def _run_next(self) -> None:
        index, config = self._next, self._config
        episode_id = f"{config.run_id}-r{self._robot_index}-{index:06d}"
        try:
            report = self._loop.run_episode(
                seed=training_seed(config.seed, self._robot_index, index),
                task=config.tasks[index % len(config.tasks)],
                episode_id=episode_id,
            )
        except BaseException:
            # Half an episode must not be uploaded under an identity that will run again.
            if self._spool is not None and self._spool.steps_of(episode_id):
                self._spool.abandon(episode_id)
                self._next += 1
            raise
        self._next += 1
        self.last_report = report
        for name, value in (
            ("episodes", 1),
            ("successes", report.success),
            ("steps", report.num_steps),
            ("lost_episodes", bool(report.lost)),
            ("fallbacks", report.num_fallbacks),
            ("calls", report.num_calls),
            ("failed_calls", report.num_failures),
            ("reconnects", report.num_reconnects),
        ):
            self._totals[name] += float(value)
        self._totals["policy_version"] = float(report.policy_version)
        for latency_s in report.latencies_s:
            self._latency.add(latency_s)
