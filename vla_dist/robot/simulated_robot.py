"""A robot of a simulated fleet: it asks the policy service for its actions and uploads what it lived through."""

from dataclasses import dataclass

from vla_dist.core.errors import ConfigError, ReplayWait
from vla_dist.core.protocols import RobotEnv
from vla_dist.core.seeding import training_seed
from vla_dist.core.types import Metrics, Segment
from vla_dist.robot.client import PolicyClient
from vla_dist.robot.control_loop import ControlConfig, ControlLoop, EpisodeReport
from vla_dist.robot.latency import LatencyHistogram
from vla_dist.robot.uploader import SegmentUploader


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRobotConfig:
    """What one simulated robot does."""

    tasks: tuple[str, ...]
    """Run one after the other, over and over."""
    run_id: str
    """With the robot's index it names its episodes."""
    seed: int = 0
    submit_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError("a simulated robot needs at least one task; got none")
        if self.submit_timeout_s <= 0:
            raise ConfigError(f"submit_timeout_s {self.submit_timeout_s} must be positive")


class SimulatedRobot:
    """A core Worker: one ``step`` is one episode, uploaded. Episode identities follow from (run, robot, index).

    Owns ``env``; ``client`` and ``uploader`` stay the caller's, who may share them among robots.
    """

    def __init__(
        self,
        env: RobotEnv,
        client: PolicyClient,
        control: ControlConfig,
        config: SimulatedRobotConfig,
        *,
        robot_index: int,
        uploader: SegmentUploader | None = None,
    ) -> None:
        self._env = env
        self._config = config
        self._uploader = uploader
        self._robot_index = robot_index
        self._pending: list[Segment] = []
        on_segment = None if uploader is None else self._pending.append
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
        """One episode, or another try at segments that the uploader could not take yet.

        Raises:
            Unreachable: no server at the start of the episode; call again, the same episode runs then.
        """
        if not self._pending:
            self._run_next()
        waited = 0.0
        while self._pending and self._uploader is not None:
            try:
                self._uploader.submit(self._pending[0], timeout_s=self._config.submit_timeout_s)
            except ReplayWait:
                waited = 1.0
                break
            self._pending.pop(0)
        return {**self._totals, **self._latency.to_metrics(), "waited": waited}

    def close(self) -> None:
        self._env.close()

    def _run_next(self) -> None:
        index, config = self._next, self._config
        try:
            report = self._loop.run_episode(
                seed=training_seed(config.seed, self._robot_index, index),
                task=config.tasks[index % len(config.tasks)],
                episode_id=f"{config.run_id}-r{self._robot_index}-{index:06d}",
            )
        except BaseException:
            # Half an episode must not be uploaded under an identity that will run again.
            self._pending.clear()
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
