"""What a buffer holds and how it is doing: read once, told by task, source, policy version and age."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vla_dist.core.types import SOURCES, Array
from vla_dist.replay.audit.server_memory import MEMORY_QUESTION, ServerMemory
from vla_dist.replay.audit.snapshot import read_at_once
from vla_dist.replay.config import TableConfig
from vla_dist.replay.episodes import Entry
from vla_dist.replay.limiter import LimiterState
from vla_dist.replay.state import BufferState, unpack_counters
from vla_dist.replay.table import RedisReplayTable

_PATIENCE_S = 10.0
AGE_BANDS = (("< 1 min", 60.0), ("< 10 min", 600.0), ("< 1 h", 3600.0), ("< 1 day", 86400.0), ("older", np.inf))

Progress = Callable[[int, int], None]
"""Called with how many are done and how many there are."""


def no_progress(done: int, total: int) -> None:
    """For those who do not watch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeGroup:
    """Complete episodes that have something in common."""

    name: str
    episodes: int
    steps: int
    successes: int
    mean_return: float
    """Undiscounted, of whole episodes."""
    mean_length: float
    """In steps."""

    @property
    def success_rate(self) -> float:
        return self.successes / max(1, self.episodes)


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSurvey:
    """One table; steps and windows as in ``limiter``."""

    name: str
    sampler: str
    max_draws: int | None
    drawable_steps: int
    sampled: int
    """Windows ever."""
    samples_per_insert: float
    """Windows for each step that was ever inserted."""
    wanted_samples_per_insert: float | None
    min_steps: int
    error_buffer_steps: float
    balance: float
    inserts_waited: int
    samples_waited: int
    waiting: str
    """Who waits and why, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferSurvey:
    """One buffer at (nearly) one moment; steps are environment steps without padding."""

    name: str
    segment_steps: int
    capacity_steps: int
    steps: int
    """Stored, those of open episodes included."""
    episodes: int
    """Complete."""
    open_episodes: int
    open_steps: int
    steps_inserted: int
    steps_evicted: int
    episodes_evicted: int
    """Complete ones, ever."""
    episodes_broken: int
    """Evicted before they were whole."""
    episodes_discarded: int
    """Damaged ones, ever."""
    episodes_intervened: int
    """Complete and stored, in which a person took over."""
    duplicates: int
    memory_bytes: int
    """Of the whole server, other buffers included."""
    memory_limit_bytes: int
    """0: none."""
    image_memory_bytes: int
    """Of the server of the images; 0 where there is none of their own."""
    memory_refusals: int
    """Of both since they started, see ``ServerMemory``."""
    archiving: bool
    episodes_archived: int
    """Ever."""
    episodes_unarchived: int
    """Stored and not archived yet; 0 while archiving is off."""
    total: EpisodeGroup
    by_task: tuple[EpisodeGroup, ...]
    by_source: tuple[EpisodeGroup, ...]
    by_version: tuple[EpisodeGroup, ...]
    """Newest first; an episode counts for the version that began it, 0 for an expert or a person."""
    by_age: tuple[EpisodeGroup, ...]
    """By time since an episode was whole, youngest first; empty ones are left out."""
    tables: tuple[TableSurvey, ...]

    @property
    def fill(self) -> float:
        return self.steps / self.capacity_steps


def full_name(table: RedisReplayTable) -> str:
    """Of a table's buffer; ``NAME:i`` for a shard."""
    return table.keys.prefix.removeprefix("{buffer:").removesuffix("}:")


def survey(table: RedisReplayTable, on_progress: Progress = no_progress) -> BufferSurvey:
    """Read the index once and count. Raises Unreachable, NotFound."""
    keys = table.keys
    packed, by, known, gone, memory, now = read_at_once(
        table.link,
        [
            ("GET", keys.state),
            ("HGETALL", keys.by),
            ("HLEN", f"{keys.prefix}episodes"),
            ("LLEN", f"{keys.prefix}evicted"),
            MEMORY_QUESTION,
            ("TIME",),
        ],
        timeout_s=_PATIENCE_S,
    )
    state = BufferState.unpack(packed, table.config.name)
    complete_steps = sum(int(value) for key, value in zip(by[::2], by[1::2], strict=True) if key.startswith(b"source:"))
    entries = []
    for entry in table.reader.entries(timeout_s=_PATIENCE_S):
        entries.append(entry)
        if len(entries) % 1000 == 0:
            on_progress(len(entries), state.complete)
    columns = EpisodeColumns.of(entries)
    server, images = ServerMemory.of(memory), images_memory(table)
    return BufferSurvey(
        name=full_name(table),
        segment_steps=table.config.num_steps,
        capacity_steps=table.config.capacity_steps,
        steps=state.steps,
        episodes=state.complete,
        open_episodes=max(0, known - gone - state.complete),
        open_steps=state.steps - complete_steps,
        steps_inserted=state.inserted,
        steps_evicted=state.evicted_steps,
        episodes_evicted=state.completions - state.complete,
        episodes_broken=state.broken,
        episodes_discarded=state.discarded,
        episodes_intervened=int(columns.intervened.sum()),
        duplicates=state.duplicates,
        memory_bytes=server.used_bytes,
        memory_limit_bytes=server.limit_bytes,
        image_memory_bytes=images.used_bytes if images else 0,
        memory_refusals=server.num_refused + (images.num_refused if images else 0),
        archiving=state.archiving,
        episodes_archived=state.archived,
        episodes_unarchived=int((columns.completions > state.archived).sum()) if state.archiving else 0,
        total=columns.group("all", np.ones(len(entries), bool)),
        by_task=columns.grouped(columns.tasks, str),
        by_source=columns.grouped(columns.sources, lambda number: SOURCES[number]),
        by_version=columns.grouped(columns.versions, str)[::-1],
        by_age=columns.by_age(int(now[0]) + int(now[1]) / 1e6),
        tables=tuple(
            survey_table(
                config,
                state,
                number,
                oldest=int(columns.completions[0]) if entries else 0,
                num_shards=num_shards_in(packed),
            )
            for number, config in enumerate(table.config.tables)
        ),
    )


def survey_table(config: TableConfig, state: BufferState, number: int, *, oldest: int, num_shards: int) -> TableSurvey:
    """One table of a buffer whose oldest stored completion is ``oldest``, 0 for none.

    A shard's limiter is judged by its share of the whole.
    """
    counters = state.tables[number]
    whole = counters.limiter.config
    share = replace(
        whole,
        min_steps=math.ceil(whole.min_steps / num_shards),
        error_buffer_steps=whole.error_buffer_steps / num_shards,
    )
    limiter = replace(counters.limiter, config=share)
    waiting = limiter_in_words(limiter)
    if state.archiving and oldest > state.archived:
        behind = state.completions - state.archived
        waiting += f"; {behind:,} episodes wait for the archive, and once the buffer is full its writers do too"
    return TableSurvey(
        name=config.name,
        sampler=config.kind,
        max_draws=config.max_draws,
        drawable_steps=limiter.drawable_steps,
        sampled=counters.sampled,
        samples_per_insert=counters.sampled / max(1, state.inserted),
        wanted_samples_per_insert=limiter.config.samples_per_insert,
        min_steps=limiter.config.min_steps,
        error_buffer_steps=limiter.config.error_buffer_steps,
        balance=limiter.balance,
        inserts_waited=counters.inserts_waited,
        samples_waited=counters.samples_waited,
        waiting=waiting,
    )


def limiter_in_words(limiter: LimiterState) -> str:
    """Who waits, and for what."""
    config, buffer = limiter.config, limiter.config.error_buffer_steps
    if limiter.drawable_steps < config.min_steps:
        return f"readers wait for data: {limiter.drawable_steps:,} of min_steps {config.min_steps:,} steps"
    if config.samples_per_insert is None:
        return "nobody waits: no ratio is asked for"
    if limiter.samples_wait:
        return f"readers wait for writers: balance {limiter.balance:,.0f} is below -{buffer:,.0f} windows"
    if limiter.inserts_wait:
        return f"writers wait for readers: balance {limiter.balance:,.0f} is above {buffer:,.0f} windows"
    return f"nobody waits: balance {limiter.balance:+,.0f} is within {buffer:,.0f} windows"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EpisodeColumns:
    """N complete episodes as arrays of (N,)."""

    completions: Array
    lengths: Array
    returns: Array
    successes: Array
    intervened: Array
    completed_at_s: Array
    tasks: Array
    sources: Array
    """Numbers in ``core.types.SOURCES``."""
    versions: Array
    """Policy version of the first segment."""

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> "EpisodeColumns":
        def column(name: str, dtype: Any) -> Array:
            return np.array([entry[name] for entry in entries], dtype)

        return cls(
            completions=column("completion", np.int64),
            lengths=column("length", np.int64),
            returns=np.array([entry["returns"].sum() for entry in entries], np.float64),
            successes=column("success", bool),
            intervened=column("intervened", bool),
            completed_at_s=column("completed_at_s", np.float64),
            tasks=np.array([entry["task"] for entry in entries], np.str_),
            sources=np.array([SOURCES.index(entry["source"]) for entry in entries], np.int64),
            versions=np.array([entry["policy_versions"][0] for entry in entries], np.int64),
        )

    def group(self, name: str, mask: Array) -> EpisodeGroup:
        """Those where ``mask`` (N,) is true."""
        num = int(mask.sum())
        steps = int(self.lengths[mask].sum())
        return EpisodeGroup(
            name=name,
            episodes=num,
            steps=steps,
            successes=int(self.successes[mask].sum()),
            mean_return=float(self.returns[mask].sum()) / max(1, num),
            mean_length=steps / max(1, num),
        )

    def grouped(self, values: Array, name: Callable[[Any], str]) -> tuple[EpisodeGroup, ...]:
        """One group for each distinct value, ascending."""
        distinct, at = np.unique(values, return_inverse=True)
        counts = [
            np.bincount(at, weights, len(distinct)) for weights in (None, self.lengths, self.successes, self.returns)
        ]
        return tuple(
            EpisodeGroup(
                name=name(value),
                episodes=int(num),
                steps=int(steps),
                successes=int(successes),
                mean_return=float(total / num),
                mean_length=float(steps / num),
            )
            for value, num, steps, successes, total in zip(distinct.tolist(), *counts, strict=True)
        )

    def by_age(self, now_s: float) -> tuple[EpisodeGroup, ...]:
        """By ``AGE_BANDS``; ``now_s`` is the server's clock."""
        bands = np.searchsorted([limit for _, limit in AGE_BANDS], now_s - self.completed_at_s, side="right")
        return self.grouped(np.minimum(bands, len(AGE_BANDS) - 1), lambda band: AGE_BANDS[band][0])


def num_shards_in(packed: bytes) -> int:
    """Of how many parts this one is, from its packed state."""
    return max(1, int(unpack_counters(packed)[0]["shards"]))


def images_memory(table: RedisReplayTable) -> ServerMemory | None:
    """Of the server of the images; None where there is none of their own. Raises Unreachable."""
    if table.images_link is table.link:
        return None
    return ServerMemory.of(table.images_link.call([MEMORY_QUESTION], timeout_s=_PATIENCE_S)[0])
