"""Batches by deadline: the most urgent observations of all robots share one forward pass.

who                consumes            waits for                 unblocked by
submit (loop)      -                   its answer or deadline    the compute thread, or the clock
compute thread     the queue           a request                 submit, close
wait_until_idle    -                   no request                the compute thread, or the clock
"""

import asyncio
import heapq
import itertools
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vla_dist.core.errors import ConfigError, DeadlineExceeded, ResourceMissing, Unreachable
from vla_dist.core.protocols import Policy
from vla_dist.core.types import Array, Metrics, Observation
from vla_dist.serving.expectation import Expectation

_log = logging.getLogger(__name__)
_MOST_RESERVED = 0.5
"""Of a request's time that may be kept for the way: one that just came is computed however slow everything was."""

Answer = tuple[Array, Any]
"""((H, A) chunk, new policy state)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatcherConfig:
    """Sizes of the one batcher of a replica."""

    bucket_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    """A batch is padded to the next of these, so that a compiled model sees few shapes; the last is the largest."""
    max_queue: int = 256
    """Requests that may wait; the next one is refused at once."""
    order: Literal["deadline", "arrival"] = "deadline"
    """Who is computed first. By arrival is only there to measure what deadlines are worth."""

    def __post_init__(self) -> None:
        sizes = self.bucket_sizes
        if not sizes or sizes[0] < 1 or list(sizes) != sorted(set(sizes)):
            raise ConfigError(f"bucket_sizes {sizes} must be positive and increasing, for example (1, 4, 16)")
        if self.order not in ("deadline", "arrival"):
            raise ConfigError(f"order {self.order!r} must be 'deadline' or 'arrival'")
        if self.max_queue < sizes[-1]:
            raise ConfigError(f"max_queue {self.max_queue} must hold at least one largest batch, {sizes[-1]}")


@dataclass(slots=True, order=True)
class _Request:
    priority: float
    """The deadline, or nothing where requests are computed by arrival."""
    order: int
    """Arrival breaks ties, and keeps the heap from comparing arrays."""
    deadline: float = field(compare=False)
    """By ``time.monotonic``: when the answer is of no use any more."""
    policy: Policy[Any] = field(compare=False)
    observation: Observation = field(compare=False)
    state: Any = field(compare=False)
    loop: asyncio.AbstractEventLoop = field(compare=False)
    answer: "asyncio.Future[Answer]" = field(compare=False)
    deadline_s: float = field(compare=False)
    """From arrival to the deadline."""
    answered_at: float = field(default=0.0, compare=False)
    abandoned: bool = field(default=False, compare=False)
    """Nobody waits any more: skip it."""


class DeadlineBatcher:
    """Earliest deadline first, computed in one thread that is never the event loop.

    A request that cannot be answered in time any more is answered DeadlineExceeded and not computed. Were it computed,
    an overloaded server would always be at the most urgent one, finish it a little too late, and help nobody: so what
    computing and the event loop may take is reserved (docs/decisions/0029). Requests of different policies (two
    versions side by side) never share a batch; rows of a batch do not depend on each other.
    """

    def __init__(self, config: BatcherConfig) -> None:
        self.config = config
        self._queue: list[_Request] = []
        self._orders = itertools.count()
        self._changed = threading.Condition()
        self._closed = False
        self._is_computing = False
        self._num_batches = 0
        self._num_rows = 0
        self._compute_s = 0.0
        self._computing = Expectation()
        """Of one batch."""
        self._noticing = Expectation()
        """Of the event loop: an answer to send, and as long before, what arrived."""
        self._thread = threading.Thread(target=self._compute_until_closed, name="policy-batcher", daemon=True)
        self._thread.start()

    async def submit(self, policy: Policy[Any], observation: Observation, state: Any, *, deadline_s: float) -> Answer:
        """The chunk (H, A) and the new state.

        Args:
            policy: the loaded version to run.
            observation: already checked against the policy's spec.
            state: memory before this observation.
            deadline_s: from now.

        Raises:
            DeadlineExceeded: not computed within ``deadline_s``; the state is unchanged.
            ResourceMissing: the queue is full.
            Unreachable: the batcher is closed.
        """
        loop = asyncio.get_running_loop()
        deadline = time.monotonic() + deadline_s
        request = _Request(
            deadline if self.config.order == "deadline" else 0.0,
            next(self._orders),
            deadline,
            policy,
            observation,
            state,
            loop,
            loop.create_future(),
            deadline_s,
        )
        with self._changed:
            if self._closed:
                raise Unreachable("the policy service is shutting down; reconnect to another replica")
            if len(self._queue) >= self.config.max_queue:
                raise ResourceMissing(
                    f"{len(self._queue)} observations wait already, the most allowed; add replicas or slow the robots"
                )
            heapq.heappush(self._queue, request)
            self._changed.notify_all()
        try:
            return await asyncio.wait_for(request.answer, deadline_s)
        except asyncio.TimeoutError as error:
            raise _late(deadline_s) from error
        finally:
            request.abandoned = True
            if request.answered_at:
                self._noticing.measure(time.monotonic() - request.answered_at)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def wait_until_idle(self, timeout_s: float) -> bool:
        """Whether no robot waits for an answer. For threads whose own work would make one wait longer: it blocks."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and not self._is_computing, timeout_s)

    def metrics(self) -> Metrics:
        """Counts since the start."""
        with self._changed:
            return {
                "batches": self._num_batches,
                "rows": self._num_rows,
                "queued": len(self._queue),
                "compute_s": self._compute_s,
            }

    def close(self, *, timeout_s: float = 10.0) -> None:
        """Refuse what waits and end the thread."""
        with self._changed:
            self._closed = True
            waiting, self._queue = self._queue, []
            self._changed.notify_all()
        _deliver([(r, Unreachable("the policy service shut down before it answered; reconnect")) for r in waiting])
        self._thread.join(timeout_s)

    def _compute_until_closed(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closed:
                    self._changed.wait(1.0)
                if self._closed:
                    return
                batch, late = self._take_batch()
                self._is_computing = bool(batch)
            _deliver([(request, _late(request.deadline_s)) for request in late])
            if batch:
                started = time.monotonic()
                _deliver(self._compute(batch))
                self._num_batches += 1
                self._num_rows += len(batch)
                took_s = time.monotonic() - started
                self._compute_s += took_s
                self._computing.measure(took_s)
            with self._changed:
                self._is_computing = False
                self._changed.notify_all()

    def _take_batch(self) -> tuple[list[_Request], list[_Request]]:
        """The most urgent request, up to a full bucket of others for the same policy, and those that are too late."""
        now = time.monotonic()
        reserve_s = self._computing.most_s + self._noticing.mean_s + self._noticing.most_s
        batch: list[_Request] = []
        late: list[_Request] = []
        others: list[_Request] = []
        while self._queue and len(batch) < self.config.bucket_sizes[-1]:
            request = heapq.heappop(self._queue)
            if request.abandoned:
                continue
            if request.deadline - min(reserve_s, _MOST_RESERVED * request.deadline_s) <= now:
                late.append(request)
            elif batch and request.policy is not batch[0].policy:
                others.append(request)
            else:
                batch.append(request)
        for request in others:
            heapq.heappush(self._queue, request)
        return batch, late

    def _compute(self, batch: list[_Request]) -> list[tuple[_Request, Answer | BaseException]]:
        try:
            return list(zip(batch, self._act(batch), strict=True))
        except Exception as error:  # noqa: BLE001 - a policy may raise anything; whoever waits must hear of it
            if len(batch) == 1:
                _log.error("a policy failed on one observation", exc_info=error)
                return [(batch[0], error)]
        # One robot's observation must not fail its neighbours: each row is computed alone.
        return [answer for request in batch for answer in self._compute([request])]

    def _act(self, batch: list[_Request]) -> list[Answer]:
        padding = next(size for size in self.config.bucket_sizes if size >= len(batch)) - len(batch)
        padded = batch + batch[-1:] * padding
        chunks, states = batch[0].policy.act([r.observation for r in padded], [r.state for r in padded])
        return list(zip(chunks[: len(batch)], states[: len(batch)], strict=True))


def _late(deadline_s: float) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"no action within {1000 * deadline_s:.0f} ms; it was not computed late. Send a newer observation, allow a "
        "longer deadline, or add replicas"
    )


def _deliver(answers: Sequence[tuple[_Request, Answer | BaseException]]) -> None:
    """Hand results to the loops that wait, one wake-up a loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Request, Answer | BaseException]]] = {}
    now = time.monotonic()
    for request, answer in answers:
        request.answered_at = now
        by_loop.setdefault(request.loop, []).append((request, answer))
    for loop, pairs in by_loop.items():
        try:
            loop.call_soon_threadsafe(_set_answers, pairs)
        except RuntimeError:
            _log.debug("a loop closed before its %d answers came", len(pairs))


def _set_answers(pairs: list[tuple[_Request, Answer | BaseException]]) -> None:
    for request, answer in pairs:
        if request.answer.done():
            continue
        if isinstance(answer, BaseException):
            request.answer.set_exception(answer)
        else:
            request.answer.set_result(answer)
