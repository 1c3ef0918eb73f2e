"""Where each part saturates, and what to shard next, from small to 1,000 robots and 64 GPUs."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from scale_parts.system import Costs, Layout, Outcome, simulate

ROBOTS = (1, 10, 30, 100, 300, 1000)
RANKS = (1, 2, 4, 8, 16, 32, 64)
ROLLOUTS = (1, 4, 16, 64, 256)
FULL = 0.7
"""Load above which a part counts as full: queues grow fast beyond it."""
_MISSED = 1e-3
"""Share of calls that may be late."""
_LINK_S = 0.5e-3
_MOST_STEPS = 24


def facts_of(facts: Mapping[str, float], **changes: Any) -> Layout:
    """A layout of the measured preset."""
    batch_size = int(facts["batch_size"])
    known = {
        "batch_size": batch_size,
        "batch_of_costs": batch_size,
        "samples_per_insert": facts["samples_per_insert"],
        "buffer_windows": facts["buffer_windows"],
        "segment_steps": int(facts["segment_steps"]),
    }
    return Layout(**{**known, **changes})


def curves(costs: Costs, facts: Mapping[str, float], *, hz: float, gpu_speed: float) -> dict[str, list[dict[str, Any]]]:
    """Each part alone against its number, everything else plentiful or one."""

    def run(**changes: Any) -> Outcome:
        layout = facts_of(facts, link_s=_LINK_S, hz=hz, **changes)
        return simulate(costs, layout, warm_up_s=1.0, seconds=3.0)

    batch = int(facts["batch_size"])
    robots = [_row("robots", n, run(robots=n, replicas=1), most=1 / _call_s(costs)) for n in ROBOTS if n <= 300]
    writers = [_row("rollouts", n, run(rollouts=n), most=1 / costs.insert_s) for n in ROLLOUTS]
    ranks = []
    for count in RANKS:
        wanted = count * gpu_speed / costs.update_s
        # Enough of them that ranks wait for the replay's server alone, which takes no more than it can.
        steps = min(wanted * batch / facts["samples_per_insert"], 1 / costs.insert_s)
        writers_wanted = math.ceil(1.2 * steps * costs.rollout_s)
        layout = {"ranks": count, "batch_size": batch * count, "update_speed": gpu_speed, "rollouts": writers_wanted}
        ranks.append(_row("ranks", count, run(**layout), most=wanted))
    return {"robots": robots, "rollouts": writers, "ranks": ranks}


def _call_s(costs: Costs) -> float:
    """Of a replica, in full batches."""
    return costs.loop_s + costs.row_s + costs.batch_s / 16


def _row(name: str, count: int, outcome: Outcome, *, most: float) -> dict[str, Any]:
    return {name: count, "most": most, **dataclasses.asdict(outcome)}


def grow(
    costs: Costs, facts: Mapping[str, float], *, robots: int, ranks: int, hz: float, gpu_speed: float
) -> Iterator[dict[str, Any]]:
    """From one of everything to a layout in which nothing is full: what was added when, and why.

    The learner shall be what is busiest: a part that holds it back is doubled, and so is one that makes robots miss.
    """
    batch = int(facts["batch_size"])
    counts = {"rollouts": 1, "replicas": 1, "gateways": 1, "shards": 1}
    for _ in range(_MOST_STEPS):
        layout = facts_of(
            facts,
            robots=robots,
            ranks=ranks,
            batch_size=batch * ranks,
            update_speed=gpu_speed,
            hz=hz,
            link_s=_LINK_S,
            **counts,
        )
        outcome = simulate(costs, layout, warm_up_s=1.0, seconds=2.0)
        part = _fullest(outcome)
        yield {**counts, **dataclasses.asdict(outcome), "next": part}
        if not part:
            return
        counts[part] *= 2


def _fullest(outcome: Outcome) -> str:
    """What to add next; empty: nothing."""
    load = outcome.load
    parts = {
        "gateways": load.get("gateway", 0.0),
        "replicas": load.get("replica", 0.0),
        "shards": load["replay"],
    }
    fullest = max(parts, key=lambda part: parts[part])
    if parts[fullest] > FULL:
        return fullest
    if outcome.missed > _MISSED:
        return "replicas"
    return "rollouts" if load.get("learner", 1.0) < FULL else ""
