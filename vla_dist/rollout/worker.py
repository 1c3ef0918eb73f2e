"""One rollout worker: episodes from an environment into a replay table, one unit of work at a time."""

from dataclasses import dataclass

from vla_dist.core.errors import ConfigError, ReplayWait
from vla_dist.core.protocols import ReplayTable, RobotEnv
from vla_dist.core.seeding import is_evaluation_seed, training_seed
from vla_dist.core.types import Metrics, Segment
from vla_dist.rollout.behaviour import Behaviour, TooEarly
from vla_dist.rollout.episode import run_episode


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """What the rollout workers of a run collect together."""

    run_id: str
    tasks: tuple[str, ...]
    num_workers: int = 1
    episodes_per_task: int = 50
    """Over all workers."""
    noise_scales: tuple[float, ...] = (0.0, 0.2, 0.4)
    """One is drawn per episode: standard deviation in action units, or the chance of a random discrete choice."""
    segment_steps: int = 32
    """T."""
    seed: int = 0
    seeds: tuple[int, ...] = ()
    """Those of each task's episodes, one each, such as what a policy failed at; empty: drawn."""
    append_timeout_s: float = 10.0

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError("a rollout needs at least one task; got none")
        if not 1 <= self.num_workers <= 1024:
            raise ConfigError(f"num_workers {self.num_workers} must be within 1..1024")
        if self.episodes_per_task < 1 or self.segment_steps < 1:
            raise ConfigError("episodes_per_task and segment_steps must be at least 1")
        if self.seeds and len(self.seeds) != self.episodes_per_task:
            raise ConfigError(
                f"{len(self.seeds)} seeds for {self.episodes_per_task} episodes_per_task; give one for each"
            )
        if leaks := [seed for seed in self.seeds if is_evaluation_seed(seed)]:
            raise ConfigError(f"seeds {leaks[:3]} are of evaluation; what training sees must be below 2**31")

    def episodes(self, worker_index: int) -> list[tuple[str, str, int]]:
        """(episode id, task, seed) of each episode that one worker runs; all workers' add up to the quota."""
        share = enumerate(self.share(worker_index))
        return [(f"{self.run_id}-w{worker_index}-{index:06d}", task, seed) for index, (task, seed) in share]

    def share(self, worker_index: int) -> list[tuple[str, int]]:
        """(task, seed) of each of them, interleaved."""
        mine = (list(self.tasks) * self.episodes_per_task)[worker_index :: self.num_workers]
        if not self.seeds:
            return [(task, training_seed(self.seed, worker_index, index)) for index, task in enumerate(mine)]
        each = [seed for seed in self.seeds for _ in self.tasks][worker_index :: self.num_workers]
        return list(zip(mine, each, strict=True))


class RolloutWorker:
    """Collects its share of a quota of episodes, then idles.

    Episode identities and seeds follow from (run, worker, index) alone. A worker that was killed and started again
    skips what the table already holds complete and repeats the rest; what it repeats, the table knows as duplicate.
    """

    def __init__(
        self, env: RobotEnv, behaviour: Behaviour, table: ReplayTable, config: RolloutConfig, *, worker_index: int
    ) -> None:
        self._env = env
        self._behaviour = behaviour
        self._table = table
        self._config = config
        self._worker_index = worker_index
        self._share = config.episodes(worker_index)
        self._next = 0
        self._pending: list[Segment] = []
        self._steps = 0
        self._episodes = 0
        self._successes = 0

    @property
    def is_done(self) -> bool:
        return self._next >= len(self._share) and not self._pending

    def step(self) -> Metrics:
        """One episode, or another try at segments that the table could not take yet.

        Raises:
            Unreachable: the table does not answer; call again, nothing is lost.
        """
        waited = 0.0
        if not self.is_done and not self._pending:
            try:
                self._run_next()
            except TooEarly:
                waited = 1.0
        while self._pending:
            try:
                self._table.append(self._pending[0], timeout_s=self._config.append_timeout_s)
            except ReplayWait:
                waited = 1.0
                break
            self._pending.pop(0)
        return {
            "steps": float(self._steps),
            "episodes": float(self._episodes),
            "success_rate": self._successes / max(1, self._episodes),
            "finished": float(self._next),
            "waited": waited,
            "done": float(self.is_done),
        }

    def close(self) -> None:
        self._env.close()

    def _run_next(self) -> None:
        name, task, seed = self._share[self._next]
        if not self._table.has_episode(name):
            self._pending += run_episode(
                self._env,
                self._behaviour,
                task=task,
                seed=seed,
                episode_id=name,
                robot_id=f"rollout-{self._worker_index}",
                segment_steps=self._config.segment_steps,
            )
            self._steps += sum(s.length for s in self._pending)
            self._episodes += 1
            self._successes += self._pending[-1].success
        self._next += 1
