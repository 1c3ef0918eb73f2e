"""The counters of a buffer and its tables, as the server packs them: see HEAD and TABLE in ``functions.lua``."""

import struct
from dataclasses import dataclass

from vla_dist.core.errors import NotFound
from vla_dist.replay.limiter import LimiterConfig, LimiterState

# See HEAD and TABLE in functions.lua.
_HEAD_NAMES = [
    "capacity",
    "remembered",
    "cameras_here",
    "archiving",
    "archived",
    "steps",
    "complete",
    "completion",
    "row",
    "gone",
    "inserted",
    "duplicates",
    "evicted_steps",
    "broken",
    "cameras_apart",
    "shards",
    "discarded",
]
_TABLE_NAMES = [
    "min_steps",
    "ratio",
    "buffer",
    "max_draws",
    "prioritised",
    "queue",
    "drawable",
    "balance",
    "sampled",
    "inserts_waited",
    "samples_waited",
    "max_priority",
    "events",
    "lost",
]
_HEAD = struct.Struct(f"<{len(_HEAD_NAMES)}d")
_TABLE = struct.Struct(f"<{len(_TABLE_NAMES)}d")


def unpack_counters(packed: bytes) -> tuple[dict[str, float], list[dict[str, float]]]:
    """All counters by their names in ``functions.lua``: the buffer's, and each table's."""
    head = dict(zip(_HEAD_NAMES, _HEAD.unpack_from(packed), strict=True))
    starts = range(_HEAD.size, len(packed), _TABLE.size)
    return head, [dict(zip(_TABLE_NAMES, _TABLE.unpack_from(packed, at), strict=True)) for at in starts]


@dataclass(frozen=True, slots=True, kw_only=True)
class TableCounters:
    """Of one table."""

    limiter: LimiterState
    sampled: int
    """Windows ever charged."""
    inserts_waited: int
    samples_waited: int
    max_priority: float
    lost: int
    """Episodes of a FIFO table that were evicted or discarded before anybody acknowledged them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferState:
    """Of the buffer; steps are environment steps without padding."""

    archiving: bool
    """Whether eviction waits for the archive."""
    archived: int
    """Completions up to this one are archived."""
    completions: int
    """Episodes that ever became whole."""
    steps: int
    """Stored now, those of open episodes included."""
    complete: int
    """Complete episodes stored now."""
    inserted: int
    """Steps ever taken in."""
    duplicates: int
    evicted_steps: int
    broken: int
    """Episodes evicted before they were whole."""
    discarded: int
    """Damaged episodes that were removed: part of their payload was missing."""
    tables: tuple[TableCounters, ...]

    @classmethod
    def unpack(cls, packed: bytes | None, name: str) -> "BufferState":
        """Raises NotFound where there is no buffer."""
        if packed is None:
            raise NotFound(f"buffer {name!r} is gone (restarted without its data?); construct a new client")
        head, tables = unpack_counters(packed)
        return cls(
            archiving=bool(head["archiving"]),
            archived=int(head["archived"]),
            completions=int(head["completion"]),
            steps=int(head["steps"]),
            complete=int(head["complete"]),
            inserted=int(head["inserted"]),
            duplicates=int(head["duplicates"]),
            evicted_steps=int(head["evicted_steps"]),
            broken=int(head["broken"]),
            discarded=int(head["discarded"]),
            tables=tuple(_table(counters) for counters in tables),
        )


def _table(counters: dict[str, float]) -> TableCounters:
    ratio = counters["ratio"]
    limiter = LimiterConfig(
        min_steps=int(counters["min_steps"]),
        samples_per_insert=None if ratio < 0 else ratio,
        error_buffer_steps=counters["buffer"],
    )
    return TableCounters(
        limiter=LimiterState(config=limiter, drawable_steps=int(counters["drawable"]), balance=counters["balance"]),
        sampled=int(counters["sampled"]),
        inserts_waited=int(counters["inserts_waited"]),
        samples_waited=int(counters["samples_waited"]),
        max_priority=counters["max_priority"],
        lost=int(counters["lost"]),
    )
