"""More observations than the machine can compute: who misses its deadline, by deadline and by arrival."""

import asyncio
import time

import numpy as np
from serve_parts.workload import INSTRUCTION, NAME, REFERENCE, registry_of

MAX_BATCH = 4
DEADLINES_S = (0.05, 0.2, 0.8)
"""A third of the robots each: quick arms, slower ones, and callers in no hurry."""


def edf_against_fifo(redis_url: str, *, seconds: float, load: float) -> dict:
    """Misses of both orders under ``load`` times what the batcher can compute; the same arrivals for both."""
    from vla_dist.models.auto import build_policy

    registry = registry_of(redis_url)
    policy = build_policy(registry.fetch(NAME, registry.resolve(REFERENCE)))
    per_s = _capacity(policy)
    found = {order: asyncio.run(_offer(policy, order, load * per_s, seconds)) for order in ("deadline", "arrival")}
    return {
        "offered_per_s": load * per_s,
        "capacity_per_s": per_s,
        "edf_miss_rate": found["deadline"],
        "fifo_miss_rate": found["arrival"],
        "misses_ratio": found["deadline"] / max(1e-9, found["arrival"]),
    }


def _observation(policy):
    from vla_dist.core.types import Observation

    return Observation(proprio=np.zeros(policy.spec.proprio_dim, np.float32), instruction=INSTRUCTION)


def _capacity(policy) -> float:
    observations = [_observation(policy)] * MAX_BATCH
    states = [policy.initial_state() for _ in observations]
    for _ in range(20):
        _, states = policy.act(observations, states)
    started, count = time.monotonic(), 0
    while time.monotonic() - started < 1.0:
        policy.act(observations, states)
        count += MAX_BATCH
    return count / (time.monotonic() - started)


async def _offer(policy, order: str, per_s: float, seconds: float) -> float:
    from vla_dist.core.errors import VlaDistError
    from vla_dist.serving.batcher import BatcherConfig, DeadlineBatcher

    batcher = DeadlineBatcher(BatcherConfig(bucket_sizes=(1, 2, MAX_BATCH), max_queue=100_000, order=order))
    rng = np.random.default_rng(0)
    arrivals = np.cumsum(rng.exponential(1 / per_s, int(per_s * seconds)))
    deadlines = rng.choice(DEADLINES_S, len(arrivals))
    observation, state = _observation(policy), policy.initial_state()
    for _ in range(20):
        _, (state,) = policy.act([observation], [state])

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
    answered = await asyncio.gather(*asked)
    batcher.close()
    return 1 - sum(answered) / len(answered)
