"""The same sessions on asyncio: right actions, many at once, and a loop that never stands still."""

import asyncio
import time
from typing import Any

import numpy as np
import pytest

from vla_dist.core.errors import ContractMismatch, DeadlineExceeded
from vla_dist.robot.async_client import AsyncPolicyClient
from vla_dist.testing.fakes import FakeEnv, FakePolicy, make_spec
from vla_dist.testing.serving import REFERENCE

SPEC = make_spec()


async def episode(client: AsyncPolicyClient, robot_id: str) -> list[Any]:
    env = FakeEnv(SPEC)
    step = env.reset(seed=3, task="go")
    chunks = []
    async with await client.open_session(SPEC, policy=REFERENCE, robot_id=robot_id) as session:
        for _ in range(10):
            chunks.append((await session.act(step.observation, deadline_s=5.0)).actions)
            step = env.step(chunks[-1][0])
        assert session.policy_version == 1
        assert session.metrics()["failures"] == 0
    return chunks


def alone() -> list[Any]:
    policy, env = FakePolicy(SPEC, bias=float(np.float32(0.05))), FakeEnv(SPEC)
    state, step, chunks = policy.initial_state(), env.reset(seed=3, task="go"), []
    for _ in range(10):
        (chunk,), (state,) = policy.act([step.observation], [state])
        chunks.append(chunk)
        step = env.step(chunk[0])
    return chunks


async def test_many_episodes_at_once_and_a_loop_that_goes_on(site: Any) -> None:
    longest, last, stop = 0.0, time.monotonic(), False

    async def beat() -> None:
        nonlocal longest, last
        while not stop:
            await asyncio.sleep(0.005)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()

    beating = asyncio.create_task(beat())
    async with AsyncPolicyClient(f"127.0.0.1:{site.port}") as client:
        results = await asyncio.gather(*(episode(client, f"r{index}") for index in range(6)))
        assert (await client.health()).num_sessions == 0
        assert (await client.policies())[0].policy == REFERENCE
        with pytest.raises(ContractMismatch):
            await client.check(make_spec(action_dim=3), policy=REFERENCE)
    stop = True
    await beating
    assert all(np.array_equal(result, alone()) for result in results)
    assert longest < 2.0, "the event loop waited for the network"


async def test_an_outage_does_not_stop_the_loop(site: Any) -> None:
    async with AsyncPolicyClient(f"127.0.0.1:{site.port}") as client:
        session = await client.open_session(SPEC, policy=REFERENCE, robot_id="r")
        site.kill()
        started = time.monotonic()
        waiting = asyncio.create_task(session.act(FakeEnv(SPEC).reset(seed=0, task="go").observation, deadline_s=0.5))
        await asyncio.sleep(0.05)
        assert time.monotonic() - started < 0.4
        with pytest.raises(DeadlineExceeded):
            await waiting
        await session.close()
