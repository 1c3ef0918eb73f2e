"""What a buffer must do, said in plain Python: dictionaries, lists and no speed."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from vla_dist.core.types import Segment
from vla_dist.replay.config import BufferConfig, Fifo, Prioritised, TableConfig
from vla_dist.replay.limiter import LimiterConfig


class Wait(Exception):
    """The limiter or the archive asks to wait."""


class Contradiction(Exception):
    """A segment that cannot belong to its episode."""


@dataclass(slots=True)
class EpisodeModel:
    id: str
    segments: dict[int, Segment] = field(default_factory=dict)
    """Ever taken in."""
    last_index: int = -1
    evicted: bool = False
    completion: int = 0
    first_row: int = 0

    @property
    def steps(self) -> int:
        return sum(segment.length for segment in self.segments.values())

    @property
    def whole(self) -> bool:
        return len(self.segments) == self.last_index + 1

    @property
    def drawable(self) -> bool:
        return self.completion > 0 and not self.evicted


class TableModel:
    def __init__(self, config: TableConfig) -> None:
        self.config = config
        self.limiter = config.limiter
        self.is_queue = isinstance(config.sampler, Fifo)
        self.is_prioritised = isinstance(config.sampler, Prioritised)
        self.balance = 0.0
        self.sampled = self.inserts_waited = self.samples_waited = self.lost = 0
        self.max_priority = 1.0
        self.priorities: dict[int, float] = {}
        """By row."""
        self.scored: set[int] = set()
        self.draws: dict[int, int] = {}
        self.used: dict[int, int] = {}
        """Steps that may not be drawn any more, by completion."""
        self.pending: dict[int, str] = {}
        """Completions taken and not acknowledged, with their consumer."""
        self.last_taken = 0

    @property
    def removes(self) -> bool:
        return self.is_queue or self.config.max_draws is not None


class BufferModel:
    def __init__(self, config: BufferConfig) -> None:
        self.config = config
        self.tables = [TableModel(table) for table in config.tables]
        self.known: dict[str, EpisodeModel] = {}
        """Stored, or evicted and still remembered; in the order they began."""
        self.remembered: list[str] = []
        self.complete: dict[int, EpisodeModel] = {}
        """Stored and whole, by completion."""
        self.completions = self.rows = 0
        self.inserted = self.duplicates = self.evicted_steps = self.broken = 0
        self.archiving, self.archived = False, 0

    @property
    def steps(self) -> int:
        return sum(e.steps for e in self.known.values() if not e.evicted)

    def drawable(self, table: TableModel) -> int:
        return sum(e.steps - table.used.get(e.completion, 0) for e in self.complete.values())

    def live_rows(self, table: TableModel) -> Iterator[tuple[int, EpisodeModel, int]]:
        """Row, episode and index of each segment that may be drawn."""
        for episode in self.complete.values():
            for index in range(episode.last_index + 1):
                row = episode.first_row + index
                if table.draws.get(row, 0) < (table.config.max_draws or 1 << 30):
                    yield row, episode, index

    def contradicts(self, segment: Segment) -> bool:
        episode, index = self.known.get(segment.episode_id), segment.segment_index
        if episode is None or index in episode.segments:
            return False
        beyond = episode.last_index >= 0 and index > episode.last_index
        return beyond or (segment.is_last and index < max(episode.segments))

    def insert(self, segment: Segment, *, first_try: bool = True) -> str:
        """Raises Wait, Contradiction."""
        episode = self.known.get(segment.episode_id)
        if episode and segment.segment_index in episode.segments:
            self.duplicates += 1
            return "duplicate"
        if self.contradicts(segment):
            raise Contradiction
        for table in self.tables:
            has_least = self.drawable(table) >= table.limiter.min_steps
            if self._counts(table) and has_least and table.balance > table.limiter.error_buffer_steps:
                table.inserts_waited += first_try
                raise Wait
        while self.steps > 0 and self.steps + segment.length > self.config.capacity_steps:
            oldest = next(e for e in self.known.values() if not e.evicted)
            if oldest.completion and self.archiving and oldest.completion > self.archived:
                raise Wait
            self.evict(oldest)
        self._end_long_stays(segment)
        for table in self.tables:
            if self._counts(table):
                table.balance += segment.length * (table.limiter.samples_per_insert or 0)
        episode = self.known.setdefault(segment.episode_id, EpisodeModel(segment.episode_id))
        episode.segments[segment.segment_index] = segment
        if segment.is_last:
            episode.last_index = segment.segment_index
        self.inserted += segment.length
        if episode.evicted:
            self.evicted_steps += segment.length
            for table in self.tables:
                self._owe_no_more(table, segment.length)
        elif episode.whole:
            self._complete(episode)
        return "inserted"

    def evict(self, episode: EpisodeModel) -> None:
        episode.evicted = True
        self.evicted_steps += episode.steps
        for table in self.tables:
            self._owe_no_more(table, episode.steps - table.used.get(episode.completion, 0))
            table.lost += table.is_queue and episode.completion > 0 and episode.completion not in table.used
        if self.complete.pop(episode.completion, None) is None:
            self.broken += 1
        self.remembered.append(episode.id)
        if len(self.remembered) > self.config.remembered_episodes:
            del self.known[self.remembered.pop(0)]

    def _end_long_stays(self, segment: Segment) -> None:
        """Where rows have places, as many as the capacity, no two stored rows may share one."""
        episode = self.known.get(segment.episode_id, EpisodeModel(segment.episode_id))
        last = segment.segment_index if segment.is_last else episode.last_index
        if episode.evicted or len(episode.segments) != last:
            return
        if not any(t.is_prioritised or t.config.max_draws for t in self.tables):
            return
        while self.complete:
            oldest = self.complete[min(self.complete)]
            if self.rows + last + 1 - oldest.first_row <= self.config.capacity_steps:
                return
            if self.archiving and oldest.completion > self.archived:
                raise Wait
            self.evict(oldest)

    def sample_waits(self, table: TableModel) -> bool:
        limiter = table.limiter
        if self.drawable(table) < limiter.min_steps:
            return True
        return limiter.samples_per_insert is not None and table.balance < -limiter.error_buffer_steps

    def charge(self, table: TableModel, num: int) -> None:
        """``num`` steps were given to a reader."""
        table.sampled += num
        if table.limiter.samples_per_insert is not None:
            table.balance -= num

    def draw(self, table: TableModel, row: int, episode: EpisodeModel) -> None:
        """A window that ends in that row was given to a reader."""
        table.draws[row] = table.draws.get(row, 0) + 1
        if table.draws[row] == table.config.max_draws:
            self._use(table, episode, episode.segments[row - episode.first_row].length)

    def take(self, table: TableModel, consumer: str, taken: list[int]) -> None:
        """What a queue handed out."""
        for completion in taken:
            table.pending[completion] = consumer
            table.last_taken = max(table.last_taken, completion)

    def takeable(self, table: TableModel, consumer: str) -> tuple[list[int], list[int]]:
        """Completions that a consumer has, and those that nobody had."""
        mine = sorted(c for c, owner in table.pending.items() if owner == consumer and c in self.complete)
        return mine, sorted(c for c in self.complete if c > table.last_taken)

    def acknowledge(self, table: TableModel, completions: list[int]) -> tuple[int, int]:
        """How many are acknowledged for the first time, and how many of them are stored no more."""
        fresh = [c for c in completions if table.pending.pop(c, None) is not None]
        stored = [c for c in fresh if c in self.complete]
        for completion in stored:
            episode = self.complete[completion]
            self.charge(table, episode.steps)
            self._use(table, episode, episode.steps)
        return len(fresh), len(fresh) - len(stored)

    def reprioritise(self, table: TableModel, row: int, priority: float) -> None:
        table.max_priority = max(table.max_priority, priority)
        if row in table.priorities:
            table.priorities[row] = float(np.float32(priority))
            table.scored.add(row)

    def override(self, table: TableModel, limiter: LimiterConfig) -> None:
        table.limiter, table.balance = limiter, 0.0

    def finish_archive(self, completion: int) -> None:
        before, self.archived = self.archived, completion
        for archived in range(before + 1, completion + 1):
            if archived in self.complete:
                self._remove_if_used_up(self.complete[archived])

    def _counts(self, table: TableModel) -> bool:
        limiter = table.limiter
        has_least = table.is_queue or self.drawable(table) >= limiter.min_steps
        return limiter.samples_per_insert is not None and has_least

    @staticmethod
    def _owe_no_more(table: TableModel, steps: int) -> None:
        if table.is_queue:
            table.balance -= steps * (table.limiter.samples_per_insert or 0)

    def _complete(self, episode: EpisodeModel) -> None:
        self.completions += 1
        episode.completion, episode.first_row = self.completions, self.rows
        self.complete[episode.completion] = episode
        self.rows += episode.last_index + 1
        for table in self.tables:
            if table.is_prioritised:
                fresh = range(episode.first_row, self.rows)
                table.priorities.update(dict.fromkeys(fresh, float(np.float32(table.max_priority))))

    def _use(self, table: TableModel, episode: EpisodeModel, steps: int) -> None:
        table.used[episode.completion] = table.used.get(episode.completion, 0) + steps
        self._remove_if_used_up(episode)

    def _remove_if_used_up(self, episode: EpisodeModel) -> None:
        if self.archiving and episode.completion > self.archived:
            return
        if all(t.removes and t.used.get(episode.completion, 0) >= episode.steps for t in self.tables):
            self.evict(episode)
