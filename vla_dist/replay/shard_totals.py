"""What several shards hold together, from what each of them says."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from vla_dist.replay.limiter import LimiterState
from vla_dist.replay.state import TableCounters


def total_of(parts: Sequence[Any]) -> Any:
    """The sum of dataclasses of one kind: a dataclass whose numbers are sums; dictionaries are summed by key."""

    def total(values: list[Any]) -> Any:
        if isinstance(values[0], dict):
            names = {name for value in values for name in value}
            return {name: sum(value.get(name, 0) for value in values) for name in sorted(names)}
        return sum(values) if isinstance(values[0], (int, float)) else values[0]

    names = [field.name for field in dataclasses.fields(parts[0])]
    return type(parts[0])(**{name: total([getattr(part, name) for part in parts]) for name in names})


def whole_table(counters: Sequence[TableCounters]) -> TableCounters:
    """One table's counters over all shards."""
    total = total_of(counters)
    return dataclasses.replace(
        total,
        limiter=whole_limiter([part.limiter for part in counters]),
        max_priority=max(part.max_priority for part in counters),
    )


def whole_limiter(parts: Sequence[LimiterState]) -> LimiterState:
    """The limiter over all shards; each stores the settings of the whole, and its own share of balance and steps."""
    return LimiterState(
        config=parts[0].config,
        drawable_steps=sum(part.drawable_steps for part in parts),
        balance=sum(part.balance for part in parts),
    )
