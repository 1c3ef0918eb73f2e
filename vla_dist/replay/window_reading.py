"""Batches of windows from one table: charged to its limiter, drawn on a copy of the index, fetched, checked.

waits for: the limiter, complete episodes. unblocked by: appends.
"""

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_dist.core.errors import ConfigError, ReplayWait
from vla_dist.core.types import Array, Batch
from vla_dist.replay.batches import replace_windows, scale_weights
from vla_dist.replay.fetching import WindowFetcher
from vla_dist.replay.following import IndexFollower
from vla_dist.replay.index import EpisodeIndex
from vla_dist.replay.limiter import ChargeNumbers
from vla_dist.replay.link import Deadline
from vla_dist.replay.losses import LossCheck
from vla_dist.replay.refusals import wait_reason
from vla_dist.replay.samplers import Drawn, make_sampler
from vla_dist.replay.window_plan import WindowPlan
from vla_dist.replay.wire import Command

if TYPE_CHECKING:
    from vla_dist.replay.table import RedisReplayTable


class WindowReader:
    """What one client draws; threads may share it."""

    def __init__(self, owner: "RedisReplayTable", *, table: int, seed: int, losses: LossCheck) -> None:
        """
        Args:
            owner: whose connections and buffer it uses.
            table: index of the table to draw from.
            seed: of the draws.
            losses: told of episodes whose payload is missing.
        """
        config = owner.config
        self._owner = owner
        self._link = owner.link
        self._config = config
        self._index = table
        self._losses = losses
        self.fetcher = WindowFetcher(
            owner.link,
            owner.images_link,
            owner.codec,
            owner.keys,
            context_steps=config.context_steps,
            cache_bytes=config.cache_bytes,
        )
        self._rng = np.random.default_rng(seed)
        self._lock = threading.Lock()
        self._charges = ChargeNumbers()
        self._follower: IndexFollower | None = None

    def sample(self, num_windows: int, *, timeout_s: float) -> Batch:
        """See ``RedisReplayTable.sample``."""
        if num_windows < 1:
            raise ConfigError(f"num_windows {num_windows} must be at least 1")
        deadline = Deadline(timeout_s)
        plan, now_s = self._draw(num_windows, deadline, timeout_s, charge=True)
        batch, gone = self._fetch(plan, deadline, now_s)
        while gone.any():
            if deadline.left_s <= 0:
                evicted = f"they were evicted first; raise capacity_steps {self._config.capacity_steps}"
                raise ReplayWait(
                    f"{gone.sum()} of {num_windows} windows could not be read again and again, for {timeout_s} s: "
                    f"{self._losses.reason or evicted}"
                )
            # Evicted between draw and fetch: those windows, and only those, are drawn anew.
            again = np.flatnonzero(gone)
            plan, now_s = self._draw(len(again), deadline, timeout_s, charge=False)
            fresh, still_gone = self._fetch(plan, deadline, now_s)
            batch = replace_windows(batch, again, fresh)
            gone[again] = still_gone
        return scale_weights(batch)

    def look(self, first: Sequence[Command], deadline: Deadline) -> tuple[list[Any], float]:
        """For ``ShardedReplayTable``: replies of ``first``, and the mass the sampler gives what may be drawn."""
        with self._lock:
            self._follower = self._follower or self._follow()
            replies = self._follower.exchange(first, deadline)
            index = self._follower.index
            return replies, self._follower.sampler.mass(index)

    def take_windows(self, num: int, deadline: Deadline, *, balance: float | None) -> tuple[Batch, Array] | None:
        """For ``ShardedReplayTable``: windows as ``look`` saw them, and which of them are (B,) bool gone.

        Args:
            balance: to be added to the limiter's; None: these windows are charged already.

        Returns:
            None where nothing may be drawn any more.
        """
        with self._lock:
            charge: Command = ("TIME",)
            if balance is not None:
                charge = self._owner.function("charge_shard", self._index, num, balance, 0, *self._charges.next())
            (answer,) = self._link.call([charge], timeout_s=deadline.left_s)
            assert self._follower is not None
            index, sampler = self._follower.index, self._follower.sampler
            if not index.live_steps or not num:
                return None
            drawn = sampler.draw(index, num, self._rng)
            plan = self._plan(index, drawn)
        return self._fetch(plan, deadline, float(answer[0 if balance is None else 1]))

    def _draw(self, num: int, deadline: Deadline, timeout_s: float, *, charge: bool) -> tuple[WindowPlan, float]:
        """What to fetch, and the server's time; waits while the limiter says so."""
        while True:
            with self._lock:
                first: Command = ("TIME",)
                if charge:
                    number = self._charges.next()
                    first = self._owner.function("charge", self._index, num, int(deadline.first), *number)
                if self._follower is None:
                    self._follower = self._follow()
                (answer,) = self._follower.exchange([first], deadline)
                index = self._follower.index
                if answer[0] != b"WAIT":
                    now_s = float(answer[1]) if charge else float(answer[0])
                    charge = False
                    if index.live_steps > 0:
                        drawn = self._follower.sampler.draw(index, num, self._rng)
                        return self._plan(index, drawn), now_s
                    reason = "all episodes were evicted or discarded in between"
                else:
                    reason = wait_reason("samples", answer)
            if not deadline.pause():
                raise ReplayWait(f"no windows within {timeout_s} s: {reason}. Are the rollout workers running?")

    def _follow(self) -> IndexFollower:
        return IndexFollower(
            self._link,
            self._owner.keys,
            self._index,
            make_sampler(self._owner.table.sampler, self._config.reader),
            num_steps=self._config.num_steps,
            capacity=self._config.capacity_steps,
            max_draws=self._owner.table.max_draws or 0,
        )

    def _plan(self, index: EpisodeIndex, drawn: Drawn) -> WindowPlan:
        context, future = self._config.context_steps, self._config.future_steps
        return WindowPlan.of(index, drawn, context_steps=context, future_steps=future)

    def _fetch(self, plan: WindowPlan, deadline: Deadline, now_s: float) -> tuple[Batch, Array]:
        batch, gone = self.fetcher.fetch(plan, deadline, now_s=now_s)
        if gone.any() and self._losses.note(plan.completions[gone]):
            finished = self._losses.look(
                timeout_s=max(1.0, deadline.left_s), until_s=time.monotonic() + deadline.left_s
            )
            if not finished:
                deadline.pause()
        if self._owner.table.max_draws is not None:
            # After the fetch: the last draw of a segment may remove it.
            uses = np.zeros(len(plan.numbers), "<f8,<f8,<u4,<u4")
            uses["f0"], uses["f1"], uses["f2"] = plan.numbers, plan.completions, plan.row_lengths
            allowed = np.flatnonzero(~gone)
            use = self._owner.function("use", self._index, uses[allowed].tobytes())
            flags = self._owner.call_removing(use, timeout_s=deadline.left_s)
            gone[allowed] = np.frombuffer(flags, np.uint8) == 0
        return batch, gone
