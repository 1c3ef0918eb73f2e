"""The counters of a buffer and its tables, as the server packs them: see HEAD and TABLE in ``functions.lua``."""

import struct
from dataclasses import dataclass

from vla_dist.core.errors import NotFound
from vla_dist.replay.limiter import LimiterConfig, LimiterState

_HEAD = struct.Struct("<14d")
_TABLE = struct.Struct("<13d")


@dataclass(frozen=True, slots=True, kw_only=True)
class TableCounters:
    """Of one table."""

    limiter: LimiterState
    sampled: int
    """Windows ever charged."""
    inserts_waited: int
    samples_waited: int
    max_priority: float


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
    tables: tuple[TableCounters, ...]

    @classmethod
    def unpack(cls, packed: bytes | None, name: str) -> "BufferState":
        """Raises NotFound where there is no buffer."""
        if packed is None:
            raise NotFound(f"buffer {name!r} is gone (restarted without its data?); construct a new client")
        head = [int(value) for value in _HEAD.unpack_from(packed)]
        _, _, _, archiving, archived, steps, complete, completion, _, _, inserted, duplicates, evicted, broken = head
        tables = [_table(packed, at) for at in range(_HEAD.size, len(packed), _TABLE.size)]
        return cls(
            archiving=bool(archiving),
            archived=archived,
            completions=completion,
            steps=steps,
            complete=complete,
            inserted=inserted,
            duplicates=duplicates,
            evicted_steps=evicted,
            broken=broken,
            tables=tuple(tables),
        )


def _table(packed: bytes, at: int) -> TableCounters:
    values = _TABLE.unpack_from(packed, at)
    min_steps, ratio, buffer, _, _, _, drawable, balance, sampled, inserts_waited, samples_waited, top, _ = values
    limiter = LimiterConfig(
        min_steps=int(min_steps), samples_per_insert=None if ratio < 0 else ratio, error_buffer_steps=buffer
    )
    return TableCounters(
        limiter=LimiterState(config=limiter, drawable_steps=int(drawable), balance=balance),
        sampled=int(sampled),
        inserts_waited=int(inserts_waited),
        samples_waited=int(samples_waited),
        max_priority=top,
    )
