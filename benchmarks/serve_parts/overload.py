"""More observations than the machine can compute: who misses its deadline, by deadline and by arrival."""

import asyncio
import sys
import time
from typing import Literal

import numpy as np
from serve_parts.workload import INSTRUCTION, NAME, REFERENCE, registry_of

MAX_BATCH = 4
DEADLINES_S = (0.05, 0.2, 0.8)
"""A third of the robots each: quick arms, slower ones, and callers in no hurry."""
ORDERS: dict[str, Literal["deadline", "arrival"]] = {"edf": "deadline", "fifo": "arrival"}


def edf_against_fifo(redis_url: str, *, seconds: float, load: float, turns: int = 6) -> dict:
    """Misses of both orders under ``load`` times what the batcher can answer; the same arrivals for both.

    Both refuse what would be too late: all that differs is the order. Each turn has arrivals of its own and a capacity
    measured just before; ``excess_rate`` is what no order could have answered.
    """
    from vla_dist.models.auto import build_policy

    registry = registry_of(redis_url)
    policy = build_policy(registry.fetch(NAME, registry.resolve(REFERENCE)))
    found: dict[str, list[dict]] = {name: [] for name in ORDERS}
    capacities = []
    for turn in range(turns):
        capacities.append(asyncio.run(_capacity(policy)))
        names = list(ORDERS) if turn % 2 else list(ORDERS)[::-1]
        for name in names:
            one = asyncio.run(_offer(policy, ORDERS[name], load * capacities[-1], seconds, seed=turn))
            found[name].append(one)
            print(f"{name} {load:g} x {capacities[-1]:.0f}/s: {one}", file=sys.stderr, flush=True)
    edf, fifo = ([one["miss_rate"] for one in found[name]] for name in ("edf", "fifo"))
    return {
        "load": load,
        "capacity_per_s": capacities,
        "excess_rate": 1 - 1 / load,
        "edf_miss_rate": float(np.mean(edf)),
        "fifo_miss_rate": float(np.mean(fifo)),
        "misses_ratio": float(np.mean(edf) / max(1e-9, np.mean(fifo))),
        "turns": found,
    }


def _observation(policy):
    from vla_dist.core.types import Observation

    return Observation(proprio=np.zeros(policy.spec.proprio_dim, np.float32), instruction=INSTRUCTION)


def _batcher(order: Literal["deadline", "arrival"]):
    from vla_dist.serving.batcher import BatcherConfig, DeadlineBatcher

    return DeadlineBatcher(BatcherConfig(bucket_sizes=(1, 2, MAX_BATCH), max_queue=100_000, order=order))


async def _capacity(policy, seconds: float = 2.0) -> float:
    """Answers a second when callers always wait: of computing and of the event loop, which share an interpreter."""
    batcher, observation, state = _batcher("deadline"), _observation(policy), policy.initial_state()
    count, ends = 0, time.monotonic() + seconds

    async def ask_again() -> None:
        nonlocal count
        while time.monotonic() < ends:
            await batcher.submit(policy, observation, state, deadline_s=10.0)
            count += 1

    started = time.monotonic()
    await asyncio.gather(*(ask_again() for _ in range(8 * MAX_BATCH)))
    batcher.close()
    return count / (time.monotonic() - started)


async def _offer(policy, order: Literal["deadline", "arrival"], per_s: float, seconds: float, *, seed: int) -> dict:
    from vla_dist.core.errors import VlaDistError

    batcher = _batcher(order)
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / per_s, int(per_s * seconds)))
    deadlines = rng.choice(DEADLINES_S, len(arrivals))
    observation, state = _observation(policy), policy.initial_state()

    async def ask(deadline_s: float) -> bool:
        try:
            await batcher.submit(policy, observation, state, deadline_s=float(deadline_s))
            return True
        except VlaDistError:
            return False

    started, asked = time.monotonic(), []
    for arrival, deadline_s in zip(arrivals, deadlines, strict=True):
        ahead = started + arrival - time.monotonic()
        if ahead > 0.001:
            await asyncio.sleep(ahead)
        asked.append(asyncio.ensure_future(ask(deadline_s)))
    answered = np.array(await asyncio.gather(*asked))
    num_computed = batcher.metrics()["rows"]
    batcher.close()
    return {
        "miss_rate": float(1 - answered.mean()),
        "computed_in_vain": float((num_computed - answered.sum()) / len(answered)),
        "miss_rate_by_deadline_ms": {
            f"{1000 * one:.0f}": float(1 - answered[deadlines == one].mean()) for one in DEADLINES_S
        },
    }
