"""Urgency decides the order, late work is refused and never done, and nobody fails for a neighbour."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence

import numpy as np
import pytest
import pytest_asyncio

from vla_dist.core.errors import ConfigError, DeadlineExceeded, ResourceMissing, Unreachable
from vla_dist.core.types import Array, Observation
from vla_dist.serving.batcher import BatcherConfig, DeadlineBatcher
from vla_dist.testing.fakes import FakePolicy, FakeState, make_spec

SPEC = make_spec()


def observe(value: float) -> Observation:
    return Observation(proprio=np.full(SPEC.proprio_dim, value, np.float32))


class GatedPolicy(FakePolicy):
    """Computes one batch for each ``gate.release()`` and remembers what it computed."""

    def __init__(self) -> None:
        super().__init__(SPEC)
        self.gate = threading.Semaphore(0)
        self.batches: list[list[float]] = []
        self.threads: set[int] = set()

    def act(
        self,
        observations: Sequence[Observation],
        states: Sequence[FakeState],
        *,
        generator: np.random.Generator | None = None,
    ) -> tuple[list[Array], list[FakeState]]:
        assert self.gate.acquire(timeout=10)
        self.threads.add(threading.get_ident())
        self.batches.append([float(o.proprio[0]) for o in observations])
        if any(o.proprio[0] == 13 for o in observations):
            raise RuntimeError("unlucky")
        return super().act(observations, states, generator=generator)


@pytest_asyncio.fixture
async def batcher() -> AsyncIterator[DeadlineBatcher]:
    batcher = DeadlineBatcher(BatcherConfig(bucket_sizes=(1, 2), max_queue=4))
    yield batcher
    batcher.close()


async def start(
    batcher: DeadlineBatcher, policy: FakePolicy, value: float, deadline_s: float
) -> "asyncio.Task[object]":
    task = asyncio.ensure_future(batcher.submit(policy, observe(value), policy.initial_state(), deadline_s=deadline_s))
    await asyncio.sleep(0.02)
    return task


async def test_earliest_deadline_first_and_padded_to_a_bucket(batcher: DeadlineBatcher) -> None:
    policy = GatedPolicy()
    tasks = [await start(batcher, policy, 0, 9.0)]  # occupies the compute thread
    for value, deadline_s in ((1, 8.0), (2, 5.0), (3, 6.0)):
        tasks.append(await start(batcher, policy, value, deadline_s))
    policy.gate.release(3)
    await asyncio.gather(*tasks)
    assert policy.batches == [[0.0], [2.0, 3.0], [1.0]]
    assert policy.threads.isdisjoint({threading.get_ident()}), "computed on the event loop's thread"


async def test_what_would_be_finished_too_late_is_not_begun(batcher: DeadlineBatcher) -> None:
    policy = GatedPolicy()

    def release_later(delay_s: float) -> None:
        threading.Timer(delay_s, policy.gate.release).start()

    for _ in range(30):  # until it is known how long a batch takes
        release_later(0.05)
        await batcher.submit(policy, observe(0), policy.initial_state(), deadline_s=5.0)
    running = await start(batcher, policy, 1, 5.0)
    hopeless = await start(batcher, policy, 2, 0.2)
    patient = await start(batcher, policy, 3, 5.0)
    await asyncio.sleep(0.12)
    policy.gate.release(2)
    with pytest.raises(DeadlineExceeded):
        await hopeless
    await asyncio.gather(running, patient)
    assert policy.batches[-2:] == [[1.0], [3.0]]


async def test_rows_equal_single_computation(batcher: DeadlineBatcher) -> None:
    policy = FakePolicy(SPEC)
    answers = await asyncio.gather(
        *(batcher.submit(policy, observe(i), FakeState(1, float(i)), deadline_s=5) for i in range(4))
    )
    for i, (chunk, state) in enumerate(answers):
        (alone,), (alone_state,) = policy.act([observe(i)], [FakeState(1, float(i))])
        assert np.array_equal(chunk, alone)
        assert state == alone_state


async def test_late_is_refused_in_time_and_never_computed(batcher: DeadlineBatcher) -> None:
    policy = GatedPolicy()
    busy = await start(batcher, policy, 0, 9.0)
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="within 50 ms"):
        await batcher.submit(policy, observe(1), policy.initial_state(), deadline_s=0.05)
    assert time.monotonic() - started < 1.0, "the answer waited for the busy thread"
    policy.gate.release(2)
    await busy
    last = await start(batcher, policy, 2, 9.0)
    await last
    assert policy.batches == [[0.0], [2.0]]


async def test_what_nobody_waits_for_is_not_computed(batcher: DeadlineBatcher) -> None:
    policy = GatedPolicy()
    busy = await start(batcher, policy, 0, 9.0)
    gone = await start(batcher, policy, 1, 9.0)
    gone.cancel()
    await asyncio.sleep(0.02)
    last = await start(batcher, policy, 2, 9.0)
    policy.gate.release(3)
    await asyncio.gather(busy, last)
    assert policy.batches == [[0.0], [2.0]]


async def test_late_is_not_computed_even_while_the_loop_is_too_busy_to_notice(batcher: DeadlineBatcher) -> None:
    policy = GatedPolicy()
    busy = await start(batcher, policy, 0, 9.0)
    late = await start(batcher, policy, 1, 0.1)
    release = threading.Timer(0.2, policy.gate.release, (2,))
    release.start()
    time.sleep(0.4)  # the point: the loop cannot mark the request as given up
    with pytest.raises(DeadlineExceeded):
        await late
    await busy
    assert policy.batches == [[0.0]]


async def test_the_event_loop_stays_free(batcher: DeadlineBatcher) -> None:
    policy = GatedPolicy()
    busy = await start(batcher, policy, 0, 9.0)
    started = time.monotonic()
    await asyncio.sleep(0.01)
    assert time.monotonic() - started < 0.5
    policy.gate.release()
    await busy


async def test_other_work_waits_until_no_robot_does(batcher: DeadlineBatcher) -> None:
    policy = GatedPolicy()
    assert batcher.wait_until_idle(0.0)
    running = await start(batcher, policy, 0, 9.0)
    queued = await start(batcher, policy, 1, 9.0)
    assert not batcher.wait_until_idle(0.05)
    other_work = asyncio.ensure_future(asyncio.to_thread(batcher.wait_until_idle, 9.0))
    policy.gate.release()
    await running
    await asyncio.sleep(0.02)
    assert not other_work.done(), "one robot still waits"
    policy.gate.release()
    await queued
    assert await other_work
    assert batcher.wait_until_idle(1.0)


async def test_the_queue_is_bounded(batcher: DeadlineBatcher) -> None:
    policy = GatedPolicy()
    tasks = [await start(batcher, policy, i, 9.0) for i in range(5)]
    with pytest.raises(ResourceMissing, match="4 observations wait"):
        await batcher.submit(policy, observe(9), policy.initial_state(), deadline_s=1)
    policy.gate.release(5)
    await asyncio.gather(*tasks)


async def test_a_bad_row_fails_alone(batcher: DeadlineBatcher) -> None:
    policy = GatedPolicy()
    tasks = [await start(batcher, policy, value, 9.0) for value in (0, 13, 2)]
    policy.gate.release(4)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(r) for r in results] == [tuple, RuntimeError, tuple]


async def test_versions_do_not_share_a_batch(batcher: DeadlineBatcher) -> None:
    policy, other = GatedPolicy(), GatedPolicy()
    tasks = [await start(batcher, p, i, 9.0) for i, p in enumerate((policy, policy, other, policy))]
    policy.gate.release(2)
    other.gate.release()
    await asyncio.gather(*tasks)
    assert policy.batches == [[0.0], [1.0, 3.0]]
    assert other.batches == [[2.0]]


async def test_close_answers_those_who_wait() -> None:
    batcher, policy = DeadlineBatcher(BatcherConfig()), GatedPolicy()
    tasks = [await start(batcher, policy, i, 9.0) for i in range(2)]
    policy.gate.release()
    batcher.close()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(r) for r in results] == [tuple, Unreachable]
    assert not batcher.is_alive
    with pytest.raises(Unreachable):
        await batcher.submit(policy, observe(1), policy.initial_state(), deadline_s=1)


@pytest.mark.parametrize("sizes", [(), (0, 1), (2, 1), (1, 1)])
def test_bucket_sizes_are_checked(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="bucket_sizes"):
        BatcherConfig(bucket_sizes=sizes)


async def test_by_arrival_only_for_comparison() -> None:
    batcher = DeadlineBatcher(BatcherConfig(bucket_sizes=(1, 2), max_queue=8, order="arrival"))
    policy = GatedPolicy()
    tasks = [await start(batcher, policy, 0, 9.0)]
    for value, deadline_s in ((1, 8.0), (2, 5.0), (3, 6.0)):
        tasks.append(await start(batcher, policy, value, deadline_s))
    policy.gate.release(3)
    await asyncio.gather(*tasks)
    assert policy.batches == [[0.0], [1.0, 2.0], [3.0]]
    batcher.close()
    with pytest.raises(ConfigError, match="order 'fifo'"):
        BatcherConfig(order="fifo")  # type: ignore[arg-type]
