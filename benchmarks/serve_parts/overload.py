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


BURST_S = 0.4
"""Half of it more comes than can be computed, half of it little: robots of one controller tick together."""


def edf_against_fifo(redis_url: str, *, seconds: float = 4.0, turns: int = 6) -> dict:
    """Misses of both orders, the same arrivals for both.

    Both refuse what would be too late: all that differs is the order. Each turn has arrivals of its own and a capacity
    measured just before. ``excess_rate`` is what no order could have answered: under lasting overload the orders
    differ in whom they fail, in bursts that the deadlines could outlast also in how many.
    """
    from vla_dist.models.auto import build_policy

    registry = registry_of(redis_url)
    policy = build_policy(registry.fetch(NAME, registry.resolve(REFERENCE)))
    lasting = _by_turns(policy, seconds, turns, high=1.3, low=1.3)
    return {**lasting, "bursts": _by_turns(policy, seconds, turns, high=1.6, low=0.2)}


def _by_turns(policy, seconds: float, turns: int, *, high: float, low: float) -> dict:
    found: dict[str, list[dict]] = {name: [] for name in ORDERS}
    capacities = []
    for turn in range(turns):
        capacities.append(asyncio.run(_capacity(policy)))
        arrivals = _arrivals(np.random.default_rng(turn), high * capacities[-1], low * capacities[-1], seconds)
        for name in list(ORDERS) if turn % 2 else list(ORDERS)[::-1]:
            one = asyncio.run(_offer(policy, ORDERS[name], arrivals, seed=turn))
            found[name].append(one)
            print(f"{name} {high:g} / {low:g} x {capacities[-1]:.0f}/s: {one}", file=sys.stderr, flush=True)
    edf, fifo = ([one["miss_rate"] for one in found[name]] for name in ("edf", "fifo"))
    load = (high + low) / 2
    return {
        "load": {"half_the_time": high, "the_other_half": low, "period_s": BURST_S, "mean": load},
        "capacity_per_s": capacities,
        "excess_rate": max(0.0, 1 - 1 / load),
        "edf_miss_rate": float(np.mean(edf)),
        "fifo_miss_rate": float(np.mean(fifo)),
        "misses_ratio": float(np.mean(edf) / max(1e-9, np.mean(fifo))),
        "turns": found,
    }


def _arrivals(rng: np.random.Generator, high_per_s: float, low_per_s: float, seconds: float) -> np.ndarray:
    """Poisson, at one rate and the other by turns: times in s, rising."""
    halves = [
        begins + BURST_S / 2 * np.sort(rng.random(rng.poisson(per_s * BURST_S / 2)))
        for period in range(round(seconds / BURST_S))
        for begins, per_s in ((period * BURST_S, high_per_s), ((period + 0.5) * BURST_S, low_per_s))
    ]
    return np.concatenate(halves)


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


async def _offer(policy, order: Literal["deadline", "arrival"], arrivals: np.ndarray, *, seed: int) -> dict:
    from vla_dist.core.errors import VlaDistError

    batcher = _batcher(order)
    deadlines = np.random.default_rng(1000 + seed).choice(DEADLINES_S, len(arrivals))
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
