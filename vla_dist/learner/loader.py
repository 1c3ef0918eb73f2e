"""Batches ready before they are asked for.

| who | consumes | waits for | unblocked by |
|---|---|---|---|
| loader thread | windows of the table | the table, in slices of a second | data, its deadline, or ``close`` |
| caller of ``next`` | finished batches | the oldest batch in the making | the thread, or its deadline |
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout

import numpy as np

from vla_dist.core.errors import ConfigError, ReplayWait, WaitTimeout
from vla_dist.core.protocols import ReplayTable
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Batch
from vla_dist.learner.algorithms.interventions import InterventionWeights, intervention_weights
from vla_dist.learner.freshness import Freshness
from vla_dist.models.actions import ActionCodec
from vla_dist.models.batch import TrainBatch, to_train_batch
from vla_dist.models.conditioning import ReturnConditioning
from vla_dist.models.goals import GoalTable
from vla_dist.models.member import PolicyModelConfig

_SLICE_S = 1.0


class Collator:
    """Turns the n-th replay batch into tensors; which words it takes depends on (seed, n) alone."""

    def __init__(
        self,
        *,
        model: PolicyModelConfig,
        spec: EnvSpec,
        conditioning: ReturnConditioning,
        goals: GoalTable,
        phrases: Mapping[str, Sequence[str]],
        seed: tuple[int, ...],
        freshness: Freshness | None = None,
        is_pinned: bool = False,
        interventions: InterventionWeights | None = None,
    ) -> None:
        """Args:
        phrases: task -> wordings; a window of such a task takes one of them at random instead of its own.
        interventions: weighs steps by who acted in them; None: all alike.
        freshness: is told of each batch.
        is_pinned: whether batches shall lie in memory that a GPU reads by itself.
        """
        self._model = model
        self._spec = spec
        self._codec = ActionCodec.of(spec)
        self._conditioning = conditioning
        self._goals = goals
        self._phrases = phrases
        self._seed = seed
        self._freshness = freshness
        self._is_pinned = is_pinned
        self._interventions = interventions

    def __call__(self, batch: Batch, index: int) -> TrainBatch:
        if self._freshness is not None:
            self._freshness.note(batch)
        goals = None
        texts = self._wordings(batch, np.random.default_rng((*self._seed, index)))
        if self._model.goal_dim:
            self._goals.remember(texts)
            goals = self._goals.lookup(texts)
        collated = to_train_batch(
            batch,
            codec=self._codec,
            conditioning=self._conditioning,
            max_episode_steps=self._spec.max_episode_steps,
            goals=goals,
            num_steps=self._model.context_steps,
            horizon=self._model.horizon,
            cameras=tuple(self._model.cameras or ()),
            instructions=texts,
            step_weights=None if self._interventions is None else intervention_weights(batch, self._interventions),
        )
        return collated.pinned() if self._is_pinned else collated

    def _wordings(self, batch: Batch, rng: np.random.Generator) -> list[str]:
        texts = []
        for task, instruction in zip(batch.tasks, batch.instructions, strict=True):
            choices = self._phrases.get(task, ())
            texts.append(choices[int(rng.integers(len(choices)))] if choices else instruction)
        return texts


class Loader:
    """One thread samples and collates ahead; whatever it raises is raised by ``next``, and it goes on after that."""

    def __init__(
        self,
        table: ReplayTable,
        collate: Callable[[Batch, int], TrainBatch],
        *,
        batch_size: int,
        timeout_s: float,
        num_prefetch: int = 2,
        first_index: int = 0,
    ) -> None:
        """Args:
        timeout_s: a batch that takes longer is a ReplayWait or WaitTimeout.
        num_prefetch: batches made ahead.
        first_index: number of the first batch, so that a resumed run goes on where it stopped.
        """
        if num_prefetch < 1 or batch_size < 1:
            raise ConfigError(f"num_prefetch {num_prefetch} and batch_size {batch_size} must be at least 1")
        self._table = table
        self._collate = collate
        self._batch_size = batch_size
        self._timeout_s = timeout_s
        self._index = first_index
        self._closed = threading.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._coming: deque[Future[TrainBatch]] = deque(self._thread.submit(self._make) for _ in range(num_prefetch))
        self.waited_s = 0.0
        """Seconds that ``next`` has kept its callers waiting, ever."""

    def next(self) -> TrainBatch:
        """Raises WaitTimeout when no batch is ready in time; calling again waits for the same one."""
        started = time.monotonic()
        try:
            batch = self._coming[0].result(timeout=2 * self._timeout_s)
        except FutureTimeout as error:
            if self._coming[0].done():
                self._advance()
                raise
            raise WaitTimeout(
                f"no batch of {self._batch_size} windows after {2 * self._timeout_s:.0f} s; look at the replay's load"
            ) from error
        except Exception:
            self._advance()
            raise
        finally:
            self.waited_s += time.monotonic() - started
        self._advance()
        return batch

    def close(self) -> None:
        """Ends the thread within about a second."""
        self._closed.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _advance(self) -> None:
        self._coming.popleft()
        self._coming.append(self._thread.submit(self._make))

    def _make(self) -> TrainBatch:
        batch = self._collate(self._sample(), self._index)
        self._index += 1
        return batch

    def _sample(self) -> Batch:
        """In slices, so that ``close`` need not wait for the whole timeout."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                left = deadline - time.monotonic()
                return self._table.sample(self._batch_size, timeout_s=max(0.01, min(_SLICE_S, left)))
            except ReplayWait:
                if self._closed.is_set() or time.monotonic() >= deadline:
                    raise
