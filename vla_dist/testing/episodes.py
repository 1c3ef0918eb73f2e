"""Episodes in memory that can be drawn from like a replay: the n-th batch depends on the seed and n alone."""

from collections.abc import Iterator

import numpy as np

from vla_dist.core.errors import ReplayWait
from vla_dist.core.protocols import AppendResult
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Array, Batch, Segment, TableStats
from vla_dist.data.returns import returns_to_go
from vla_dist.testing.fakes import make_segment


class EpisodeTable:
    """A ReplayTable whose draws can be repeated, for tests that compare two runs bit for bit.

    ``context_steps`` K and ``future_steps`` F; ``first_batch`` is the number of the first draw, for the table of a
    resumed run.
    """

    def __init__(
        self, spec: EnvSpec, *, context_steps: int, future_steps: int = 0, seed: int = 0, first_batch: int = 0
    ) -> None:
        self.spec = spec
        self._context_steps = context_steps
        self._future_steps = future_steps
        self._seed = seed
        self._draws = first_batch
        self._segments: dict[str, dict[int, Segment]] = {}
        self._steps_sampled = 0

    def append(self, segment: Segment, *, timeout_s: float) -> AppendResult:
        held = self._segments.setdefault(segment.episode_id, {})
        if segment.segment_index in held:
            return "duplicate"
        held[segment.segment_index] = segment
        return "inserted"

    def has_episode(self, episode_id: str) -> bool:
        return _is_whole(self._segments.get(episode_id, {}))

    def episodes(self, limit: int | None = None) -> Iterator[list[Segment]]:
        whole = [held for held in self._segments.values() if _is_whole(held)]
        for held in whole[:limit]:
            yield [held[index] for index in sorted(held)]

    def sample(self, num_windows: int, *, timeout_s: float) -> Batch:
        episodes = list(self.episodes())
        if not episodes:
            raise ReplayWait(f"no complete episode after {timeout_s} s; append one")
        rng = np.random.default_rng((self._seed, self._draws))
        self._draws += 1
        self._steps_sampled += num_windows
        lengths = np.array([sum(s.length for s in episode) for episode in episodes])
        chosen = rng.choice(len(episodes), num_windows, p=lengths / lengths.sum())
        ends = rng.integers(lengths[chosen])
        return self._windows([episodes[i] for i in chosen], lengths[chosen], ends, chosen)

    def stats(self) -> TableStats:
        episodes = list(self.episodes())
        num_steps = sum(s.length for held in self._segments.values() for s in held.values())
        return TableStats(
            num_steps=num_steps,
            num_episodes=len(episodes),
            steps_inserted=num_steps,
            steps_sampled=self._steps_sampled,
            duplicates=0,
            inserts_waited=0,
            samples_waited=0,
            steps_by_source={},
            episodes_by_task={},
            num_bytes=0,
        )

    def _windows(self, episodes: list[list[Segment]], lengths: Array, ends: Array, numbers: Array) -> Batch:
        steps = ends[:, None] - np.arange(self._context_steps - 1, -1, -1)
        mask = steps >= 0
        steps = np.where(mask, steps, 0)

        later = ends[:, None] + 1 + np.arange(self._future_steps)
        future_mask = later < lengths[:, None]
        later = np.where(future_mask, later, 0)

        def whole(name: str) -> list[Array]:
            return [np.concatenate([getattr(s, name)[: s.length] for s in episode]) for episode in episodes]

        def frames(camera: str) -> list[Array]:
            return [np.concatenate([s.images[camera][: s.length] for s in episode]) for episode in episodes]

        def cut(columns: list[Array], at: Array = steps) -> Array:
            return np.stack([column[index] for column, index in zip(columns, at, strict=True)])

        return Batch(
            proprio=cut(whole("proprio")),
            actions=cut(whole("actions")),
            target_actions=cut(whole("target_actions")),
            rewards=cut(whole("rewards")),
            returns_to_go=cut([returns_to_go(rewards).astype(np.float32) for rewards in whole("rewards")]),
            timesteps=steps.astype(np.int64),
            padding_mask=mask,
            episode_lengths=lengths.astype(np.int64),
            success=np.array([episode[-1].success for episode in episodes]),
            policy_versions=np.array([episode[0].policy_version for episode in episodes], np.int64),
            instructions=tuple(episode[0].instruction for episode in episodes),
            tasks=tuple(episode[0].task for episode in episodes),
            sources=tuple(episode[0].source for episode in episodes),
            images={camera.name: cut(frames(camera.name)) for camera in self.spec.cameras},
            future_target_actions=cut(whole("target_actions"), later) if self._future_steps else None,
            future_mask=future_mask if self._future_steps else None,
            interventions=cut(whole("interventions")),
            episodes=numbers.astype(np.int64),
            future_interventions=cut(whole("interventions"), later) & future_mask if self._future_steps else None,
        )


def fill(table: EpisodeTable, *, num_episodes: int, tasks: tuple[str, ...] = ("go", "stop")) -> None:
    """Append noise episodes of two segments; every third one fails."""
    for index in range(num_episodes):
        for segment_index in range(2):
            segment = make_segment(
                table.spec,
                episode_id=f"episode-{index}",
                segment_index=segment_index,
                length=5 if segment_index else None,
                is_last=segment_index == 1,
                success=index % 3 != 2,
                task=tasks[index % len(tasks)],
                seed=index,
            )
            table.append(segment, timeout_s=1.0)


def _is_whole(held: dict[int, Segment]) -> bool:
    return bool(held) and held[max(held)].is_last and sorted(held) == list(range(len(held)))
