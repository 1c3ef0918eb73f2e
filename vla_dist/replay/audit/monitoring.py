"""A buffer watched over time: what goes in and out each second, beside what it holds."""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vla_dist.core.types import Array
from vla_dist.replay.audit.inspection import (
    EpisodeColumns,
    EpisodeGroup,
    TableSurvey,
    full_name,
    images_memory,
    num_shards_in,
    survey_table,
)
from vla_dist.replay.audit.server_memory import MEMORY_QUESTION, ServerMemory
from vla_dist.replay.following import IndexFollower
from vla_dist.replay.link import Deadline
from vla_dist.replay.samplers import UniformDraw
from vla_dist.replay.state import BufferState
from vla_dist.replay.table import RedisReplayTable

_PATIENCE_S = 10.0
_HISTORY = 120
_SMOOTHING_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorFrame:
    """A buffer at one moment; rates are per second, over the last few seconds."""

    name: str
    watched_s: float
    steps: int
    capacity_steps: int
    episodes: int
    open_episodes: int
    rates: Mapping[str, float]
    """``inserted`` and ``evicted`` steps, ``completed`` episodes, ``duplicates`` refused."""
    history: Mapping[str, Sequence[float]]
    """``inserted`` and ``sampled`` over all tables: one rate for each frame, oldest first."""
    tables: tuple[TableSurvey, ...]
    table_rates: tuple[Mapping[str, float], ...]
    """For each table: ``sampled`` windows, ``inserts_waited``, ``samples_waited``."""
    memory_bytes: int
    memory_limit_bytes: int
    """0: none."""
    image_memory_bytes: int
    memory_refusals: int
    """Of the servers since they started, see ``ServerMemory``."""
    archiving: bool
    archive_backlog: int
    """Episodes that became whole since the last one archived; 0 while archiving is off."""
    by_task: tuple[EpisodeGroup, ...]
    """Most steps first."""
    by_version: tuple[EpisodeGroup, ...]
    """Newest first."""
    age_p50_s: float
    """Half of the complete episodes were whole for longer; 0 where there is none."""
    age_max_s: float


class ReplayMonitor:
    """Looks at one buffer again and again; keeps a copy of its index, so a look costs what has changed."""

    def __init__(self, table: RedisReplayTable) -> None:
        self._table = table
        self._follower = IndexFollower(
            table.link,
            table.keys,
            0,
            UniformDraw(),
            num_steps=table.config.num_steps,
            capacity=table.config.capacity_steps,
            max_draws=0,
        )
        self._seen: deque[tuple[float, BufferState]] = deque()
        self._history: dict[str, deque[float]] = {name: deque(maxlen=_HISTORY) for name in ("inserted", "sampled")}
        self._started_s = time.monotonic()

    def look(self) -> MonitorFrame:
        """The buffer now. Raises Unreachable, NotFound."""
        table, keys = self._table, self._table.keys
        packed, known, gone, info, now = self._follower.exchange(
            [
                ("GET", keys.state),
                ("HLEN", f"{keys.prefix}episodes"),
                ("LLEN", f"{keys.prefix}evicted"),
                MEMORY_QUESTION,
                ("TIME",),
            ],
            Deadline(_PATIENCE_S),
        )
        state = BufferState.unpack(packed, table.config.name)
        now_s = int(now[0]) + int(now[1]) / 1e6
        rates, table_rates = self._rates(now_s, state)
        columns, versions, tasks = self._columns()
        memory, images = ServerMemory.of(info), images_memory(table)
        ages = now_s - columns.completed_at_s
        oldest = int(columns.completions[0]) if len(ages) else 0
        by_task = columns.grouped(columns.tasks, lambda number: tasks[number])
        return MonitorFrame(
            name=full_name(table),
            watched_s=time.monotonic() - self._started_s,
            steps=state.steps,
            capacity_steps=table.config.capacity_steps,
            episodes=state.complete,
            open_episodes=max(0, known - gone - state.complete),
            rates=rates,
            history={name: tuple(values) for name, values in self._history.items()},
            tables=tuple(
                survey_table(config, state, number, oldest=oldest, num_shards=num_shards_in(packed))
                for number, config in enumerate(table.config.tables)
            ),
            table_rates=table_rates,
            memory_bytes=memory.used_bytes,
            memory_limit_bytes=memory.limit_bytes,
            image_memory_bytes=images.used_bytes if images else 0,
            memory_refusals=memory.num_refused + (images.num_refused if images else 0),
            archiving=state.archiving,
            archive_backlog=state.completions - state.archived if state.archiving else 0,
            by_task=tuple(sorted(by_task, key=lambda group: -group.steps)),
            by_version=columns.grouped(versions, str)[::-1],
            age_p50_s=float(np.median(ages)) if len(ages) else 0.0,
            age_max_s=float(ages.max()) if len(ages) else 0.0,
        )

    def _columns(self) -> tuple[EpisodeColumns, Array, list[str]]:
        """The complete episodes that are stored; their versions again, and the names of the tasks they number."""
        index = self._follower.index
        episodes, rows = index.episodes, index.rows
        stored = rows["length"][episodes["first_row"]] > 0
        first_rows = episodes["first_row"][stored]
        versions = rows["policy_version"][first_rows]
        columns = EpisodeColumns(
            completions=episodes["completion"][stored],
            lengths=episodes["length"][stored].astype(np.int64),
            # The index of a reader leaves out the first segment's own reward; a live view does without returns.
            returns=np.zeros(len(first_rows)),
            successes=episodes["success"][stored] > 0,
            intervened=episodes["intervened"][stored] > 0,
            completed_at_s=episodes["completed_at_s"][stored],
            tasks=episodes["task"][stored],
            sources=episodes["source"][stored],
            versions=versions,
        )
        return columns, versions, index.tasks.by_number

    def _rates(self, now_s: float, state: BufferState) -> tuple[dict[str, float], tuple[dict[str, float], ...]]:
        """Since some seconds ago, so that a number can be read; the history is since the last look."""
        self._seen.append((now_s, state))
        if len(self._seen) > 1:
            (before_s, before), passed = self._seen[-2], max(1e-3, now_s - self._seen[-2][0])
            self._history["inserted"].append((state.inserted - before.inserted) / passed)
            self._history["sampled"].append((_sampled(state) - _sampled(before)) / passed)
        while len(self._seen) > 2 and self._seen[1][0] <= now_s - _SMOOTHING_S:
            self._seen.popleft()
        before_s, before = self._seen[0]
        passed = max(1e-3, now_s - before_s)
        rates = {
            "inserted": (state.inserted - before.inserted) / passed,
            "evicted": (state.evicted_steps - before.evicted_steps) / passed,
            "completed": (state.completions - before.completions) / passed,
            "duplicates": (state.duplicates - before.duplicates) / passed,
        }
        table_rates = tuple(
            {name: (getattr(now, name) - getattr(then, name)) / passed for name in _TABLE_RATES}
            for now, then in zip(state.tables, before.tables, strict=True)
        )
        return rates, table_rates


_TABLE_RATES = ("sampled", "inserts_waited", "samples_waited")


def _sampled(state: BufferState) -> int:
    return sum(table.sampled for table in state.tables)
