"""A buffer over several servers: each episode lies whole on one of them, a batch takes from all.

Each server holds a buffer of its own, under the hash tag ``{buffer:NAME:i}``, so that on a Redis Cluster too all keys
of a shard are on one node. Nothing is atomic over several servers, and nothing needs to be: writers only meet the share
of the limiter that their shard has, and whoever samples compares the sums and evens the shares out.

Dimensions: B windows, S shards.
"""

import dataclasses
import heapq
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from vla_dist.core.errors import ConfigError, ReplayWait, Unreachable, VlaDistError
from vla_dist.core.protocols import AppendResult
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Array, Batch, Segment, TableStats
from vla_dist.replay.batches import join_windows, scale_weights
from vla_dist.replay.config import BufferConfig
from vla_dist.replay.episodes import Entry
from vla_dist.replay.keys import Keys
from vla_dist.replay.limiter import ChargeNumbers, LimiterConfig, LimiterState
from vla_dist.replay.link import Deadline, RedisLink
from vla_dist.replay.shard_totals import total_of, whole_limiter, whole_table
from vla_dist.replay.state import BufferState
from vla_dist.replay.table import RedisReplayTable

_PATIENCE_S = 10.0

R = TypeVar("R")


def shard_of(episode_id: str, num_shards: int) -> int:
    """Where an episode lies; the same in every process and version."""
    return zlib.crc32(episode_id.encode()) % num_shards


class ShardedReplayTable:
    """A client of one table of a buffer over S servers; the interface is that of ``RedisReplayTable``.

    Capacity and limiter are those of the whole. A server that does not answer stops sampling, because without its
    episodes the draws would be biased; writers of episodes that lie on others go on.
    """

    def __init__(
        self,
        urls: Sequence[str],
        spec: EnvSpec,
        config: BufferConfig,
        *,
        table: str | None = None,
        seed: int = 0,
        images_urls: Sequence[str] | None = None,
    ) -> None:
        """Create the buffer where it does not exist.

        Args:
            urls: of the servers, always in the same order; for a Redis Cluster as often as there shall be shards, each
                naming any of its nodes.
            spec: contract of the robots whose episodes it holds.
            config: of the whole; the capacity must be a multiple of S.
            table: the one to sample from; None: the first.
            seed: of this client's draws; readers of one run need different ones.
            images_urls: another server for the images of each shard; None: the same servers.

        Raises:
            ConfigError: settings that cannot work or be split, another number or order of servers than the buffer was
                created with.
            NotFound: no such table.
            Unreachable: a server does not answer within 10 s.
        """
        if len(urls) < 2:
            raise ConfigError(f"{len(urls)} servers, expected at least 2; use RedisReplayTable for one")
        if images_urls is not None and len(images_urls) != len(urls):
            raise ConfigError(f"{len(images_urls)} servers of images for {len(urls)} shards, expected as many")
        part = config.split(len(urls))
        self.spec = spec
        self.config = config
        self.table = config.tables[config.table_index(table or config.tables[0].name)]
        self._index = config.table_index(self.table.name)
        _require_same_servers(config.name, urls)
        self._threads = ThreadPoolExecutor(len(urls), thread_name_prefix="replay-shard")
        self._rng = np.random.default_rng(seed)
        self._charges = ChargeNumbers()
        self._charge_lock = threading.Lock()
        self._max_priority = 0.0
        seeds = np.random.SeedSequence(seed).generate_state(len(urls)).tolist()
        opened: list[RedisReplayTable] = []
        try:
            for number, url in enumerate(urls):
                images_url = None if images_urls is None else images_urls[number]
                shard = (number, len(urls))
                opened.append(
                    RedisReplayTable(
                        url, spec, part, table=table, seed=seeds[number], images_url=images_url, shard=shard
                    )
                )
        except VlaDistError:
            for one in opened:
                one.close()
            raise
        for one in opened:
            one.when_inserts_wait(self._let_inserts_go_on)
        self.shards = tuple(opened)
        """Each of them, for what is done shard by shard: archives, FIFO queues, sweeps."""

    def append(self, segment: Segment, *, timeout_s: float) -> AppendResult:
        """As ``RedisReplayTable.append``; only the server of its episode is asked."""
        return self.append_all([segment], timeout_s=timeout_s)[0]

    def append_all(
        self,
        segments: Sequence[Segment],
        *,
        timeout_s: float,
        frames: Sequence[Mapping[str, bytes | memoryview]] | None = None,
    ) -> list[AppendResult]:
        """As ``RedisReplayTable.append_all``; where one server fails the others still store theirs."""
        places = [shard_of(segment.episode_id, len(self.shards)) for segment in segments]
        wanted = sorted(set(places))

        def append(shard: int) -> list[AppendResult]:
            mine = [number for number, place in enumerate(places) if place == shard]
            theirs = None if frames is None else [frames[number] for number in mine]
            return self.shards[shard].append_all(
                [segments[number] for number in mine], timeout_s=timeout_s, frames=theirs
            )

        # Appends may wait for samples, so they must not take up the threads in which samples are drawn.
        with ThreadPoolExecutor(max(1, len(wanted)), thread_name_prefix="replay-append") as threads:
            parts = self._on_each(append, wanted, threads)
        results = {shard: iter(part) for shard, part in zip(wanted, parts, strict=True)}
        return [next(results[place]) for place in places]

    def sample(self, num_windows: int, *, timeout_s: float) -> Batch:
        """B windows over all shards, as likely as if all lay on one.

        Raises:
            ReplayWait: the limiter refused for ``timeout_s``, or eviction outran the reader.
            Unreachable: a server does not answer; it is named.
        """
        if num_windows < 1:
            raise ConfigError(f"num_windows {num_windows} must be at least 1")
        deadline = Deadline(timeout_s)
        balances: Array | None
        masses, balances = self._admit(num_windows, deadline, timeout_s)
        parts: list[tuple[Batch, Array]] = []
        missing = num_windows
        while missing:
            if masses.sum() > 0:
                counts = self._rng.multinomial(missing, masses / masses.sum())
                taken = self._take(counts, balances, deadline)
                parts += taken
                missing -= sum(int(keep.sum()) for _, keep in taken)
                balances = None
            if missing:
                if not deadline.pause():
                    raise ReplayWait(
                        f"{missing} of {num_windows} windows could not be read again and again, for {timeout_s} s: "
                        f"they were evicted or discarded first; raise capacity_steps {self.config.capacity_steps}"
                    )
                seen = self._on_each(lambda shard: self.shards[shard].windows.look([], deadline))
                masses = np.array([mass for _, mass in seen])
        return scale_weights(join_windows(parts))

    def update_priorities(self, items: Array, priorities: Array, *, timeout_s: float = _PATIENCE_S) -> None:
        """As ``RedisReplayTable.update_priorities``."""
        items, priorities = np.asarray(items), np.asarray(priorities, np.float64)
        if len(items) != len(priorities):
            raise ConfigError(f"{len(items)} items with {len(priorities)} priorities, expected as many")
        if not len(items):
            return
        shards, local = items % len(self.shards), items // len(self.shards)
        highest = float(priorities.max())
        # Segments that nobody has scored have the highest priority of the whole, so each shard must know it.
        spread = highest > self._max_priority

        def update(shard: int) -> None:
            mine = shards == shard
            numbers, values = local[mine], priorities[mine]
            if spread:
                numbers, values = np.append(numbers, -1), np.append(values, highest)
            self.shards[shard].update_priorities(numbers, values, timeout_s=timeout_s)

        self._on_each(update, range(len(self.shards)) if spread else np.unique(shards).tolist())
        self._max_priority = max(self._max_priority, highest)

    def has_episode(self, episode_id: str) -> bool:
        """As ``RedisReplayTable.has_episode``."""
        shard = shard_of(episode_id, len(self.shards))
        return self._on_each(lambda number: self.shards[number].has_episode(episode_id), [shard])[0]

    def stats(self) -> TableStats:
        """Sums over the shards. Raises Unreachable."""
        parts = self._on_each(lambda shard: self.shards[shard].stats())
        by_server = {shard.link.address: part.num_bytes for shard, part in zip(self.shards, parts, strict=True)}
        return dataclasses.replace(total_of(parts), num_bytes=sum(by_server.values()))

    def state(self) -> BufferState:
        """Sums over the shards; limiters as ``limiter_state``. Raises Unreachable."""
        states = self._on_each(lambda shard: self.shards[shard].state())
        total = dataclasses.replace(total_of(states), tables=())
        tables = tuple(whole_table(counters) for counters in zip(*(state.tables for state in states), strict=True))
        return dataclasses.replace(total, archiving=any(state.archiving for state in states), tables=tables)

    def limiter_state(self) -> LimiterState:
        """The limiter's numbers over all shards, now. Raises Unreachable."""
        return self.state().tables[self._index].limiter

    def override_limiter(self, limiter: LimiterConfig) -> None:
        """As ``RedisReplayTable.override_limiter``; after Unreachable call it again."""
        self._on_each(lambda shard: self.shards[shard].override_limiter(limiter))

    def episodes(self, limit: int | None = None) -> Iterator[list[Segment]]:
        """Complete episodes, in the order they became whole by the servers' clocks, each as its segments in order."""

        def entries(shard: RedisReplayTable) -> Iterator[tuple[Entry, RedisReplayTable]]:
            return ((entry, shard) for entry in shard.reader.entries(timeout_s=_PATIENCE_S))

        given = 0
        merged = heapq.merge(*map(entries, self.shards), key=lambda pair: pair[0]["completed_at_s"])
        for entry, shard in merged:
            if limit is not None and given >= limit:
                return
            segments = shard.read_episode(entry, timeout_s=_PATIENCE_S)
            if segments:
                given += 1
                yield segments

    def discard_incomplete(self, *, timeout_s: float = _PATIENCE_S) -> int:
        """As ``RedisReplayTable.discard_incomplete``."""
        return sum(self._on_each(lambda shard: self.shards[shard].discard_incomplete(timeout_s=timeout_s)))

    def close(self) -> None:
        """Close the connections; what is stored stays."""
        self._threads.shutdown()
        for shard in self.shards:
            shard.close()

    def _admit(self, num: int, deadline: Deadline, timeout_s: float) -> tuple[Array, Array]:
        """Wait for the limiter of the whole; returns (S,) the mass of each shard, and (S,) what to charge to each.

        Charges leave the same balance on all shards, wherever the windows come from.
        """
        while True:
            seen = self._on_each(lambda n: self.shards[n].windows.look([("GET", self.shards[n].keys.state)], deadline))
            limiters = [BufferState.unpack(replies[0], self.config.name).tables for replies, _ in seen]
            parts = [tables[self._index].limiter for tables in limiters]
            balances = np.array([part.balance for part in parts])
            whole = whole_limiter(parts)
            if not whole.samples_wait:
                rated = whole.config.samples_per_insert is not None
                after = (whole.balance - num) / len(parts) if rated else balances
                return np.array([mass for _, mass in seen]), after - balances
            if deadline.first:
                self._charge(self._index, np.zeros(1), waits=1)
            self._even_out(self._index, parts)
            if not deadline.pause():
                raise ReplayWait(
                    f"no windows within {timeout_s} s: the limiter makes samples wait: {whole.drawable_steps} steps of "
                    f"complete episodes stored on {len(parts)} servers, min_steps {whole.config.min_steps}; balance "
                    f"{whole.balance:.1f} windows, error buffer {whole.config.error_buffer_steps}, samples_per_insert "
                    f"{whole.config.samples_per_insert}. Are the rollout workers running?"
                )

    def _let_inserts_go_on(self) -> None:
        """A writer waits for its shard alone: it need not where the whole does not make it wait."""
        try:
            states = self._on_each(lambda shard: self.shards[shard].state())
            for index, tables in enumerate(zip(*(state.tables for state in states), strict=True)):
                self._even_out(index, [counters.limiter for counters in tables])
        except Unreachable:
            # Of a server that is not its own: then its shard's share is what holds.
            return

    def _even_out(self, index: int, parts: Sequence[LimiterState]) -> None:
        """Share the balance out anew where a shard makes its writers wait and the whole does not.

        Else that shard could wait for samples while another one makes the samples wait, for ever.
        """
        whole, balances = whole_limiter(parts), np.array([part.balance for part in parts])
        most, share = whole.config.error_buffer_steps / len(parts), whole.balance / len(parts)
        if whole.drawable_steps < whole.config.min_steps:
            # What is inserted before the whole holds enough does not count; a shard may hold its share earlier.
            most, share = 0.0, min(0.0, share)
        if whole.config.samples_per_insert is not None and (balances > most).any() and share <= most:
            self._charge(index, share - balances, waits=0)

    def _charge(self, index: int, balances: Array, *, waits: int) -> None:
        """To table ``index`` of the first shards, as many as there are ``balances``; ``waits`` go to the first."""

        def charge(shard: int) -> None:
            table = self.shards[shard]
            count = waits if shard == 0 else 0
            call = table.function("charge_shard", index, 0, float(balances[shard]), count, *number)
            table.link.call([call], timeout_s=_PATIENCE_S)

        with self._charge_lock:
            number = self._charges.next()
            self._on_each(charge, range(len(balances)))

    def _take(self, counts: Array, balances: Array | None, deadline: Deadline) -> list[tuple[Batch, Array]]:
        """Windows of the shards in parallel, each part with (B,) bool, those that are whole.

        ``balances`` (S,) are charged; None: it is paid already.
        """

        def take(shard: int) -> tuple[Batch, Array] | None:
            balance = None if balances is None else float(balances[shard])
            found = self.shards[shard].windows.take_windows(int(counts[shard]), deadline, balance=balance)
            if found is None:
                return None
            batch, gone = found
            assert batch.items is not None
            assert batch.episodes is not None
            own = {name: getattr(batch, name) * len(self.shards) + shard for name in ("items", "episodes")}
            return dataclasses.replace(batch, **own), ~gone

        wanted = [
            shard for shard in range(len(self.shards)) if counts[shard] or (balances is not None and balances[shard])
        ]
        return [part for part in self._on_each(take, wanted) if part is not None]

    def _on_each(
        self,
        action: Callable[[int], R],
        shards: Sequence[int] | None = None,
        threads: ThreadPoolExecutor | None = None,
    ) -> list[R]:
        """Answers of the shards, asked in parallel; all have ended before the first failure is raised."""
        numbers = range(len(self.shards)) if shards is None else shards
        if len(numbers) == 1:
            return [self._named(action, numbers[0])]
        futures = [(threads or self._threads).submit(self._named, action, number) for number in numbers]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            # Waiting passes; a server that is down does not.
            raise min(errors, key=lambda error: not isinstance(error, Unreachable))
        return [future.result() for future in futures]

    def _named(self, action: Callable[[int], R], shard: int) -> R:
        try:
            return action(shard)
        except Unreachable as error:
            raise Unreachable(f"shard {shard} of {len(self.shards)}: {error}") from error


def refuse_shards(url: str, name: str, *, timeout_s: float = _PATIENCE_S) -> None:
    """Raise ConfigError where a buffer that is meant to lie on this server alone was created over several."""
    if _exists(url, [Keys(name, 0)], timeout_s)[0]:
        raise ConfigError(
            f"buffer {name!r} was created over several servers; give all their URLs in the same order, or another name"
        )


def _require_same_servers(name: str, urls: Sequence[str]) -> None:
    """Refuse what would hide episodes behind empty shards: another order of servers, or data of a single one."""
    keys = [Keys(name, number) for number in range(len(urls))]
    held = [_exists(url, [*keys, Keys(name)], _PATIENCE_S) for url in urls]
    if any(row[-1] for row in held):
        raise ConfigError(
            f"buffer {name!r} was created on a single server, expected one over {len(urls)}; give that URL alone, or "
            "another name and refill it from the archive"
        )
    for number in range(len(urls)):
        elsewhere = [other for other, row in enumerate(held) if row[number]]
        if elsewhere and number not in elsewhere:
            raise ConfigError(
                f"buffer {name!r}: shard {number} lies on server {elsewhere[0]} of the {len(urls)} that were given "
                "(counted from 0); give the URLs in the order in which it was created"
            )


def _exists(url: str, buffers: Sequence[Keys], timeout_s: float) -> list[bool]:
    link = RedisLink(url)
    try:
        # One by one: on a cluster each may be on another node.
        return [bool(link.call([("EXISTS", keys.state)], timeout_s=timeout_s)[0]) for keys in buffers]
    finally:
        link.close()
