"""The replay table in Redis: exactly-once appends, windows of complete episodes, limiters that never hang.

``writing`` appends; ``window_reading`` draws on a copy of the index that ``following`` keeps, and turns draws into
batches. What must happen at once is in ``functions.lua``.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vla_dist.core.errors import ConfigError, NotFound, VlaDistError
from vla_dist.core.protocols import AppendResult
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import SOURCES, Array, Batch, Segment, TableStats
from vla_dist.data.segment_codec import SegmentCodec
from vla_dist.replay.config import (
    BufferConfig,
    Fifo,
    buffer_from_identity,
    num_shards_of,
    ratio_field,
    require_same_identity,
)
from vla_dist.replay.episodes import Entry, EpisodeReader, PayloadMissing
from vla_dist.replay.keys import Keys
from vla_dist.replay.limiter import LimiterConfig, LimiterState
from vla_dist.replay.link import RedisLink, function_name
from vla_dist.replay.losses import LossCheck
from vla_dist.replay.state import BufferState
from vla_dist.replay.sweeping import ImagesGone
from vla_dist.replay.window_reading import WindowReader
from vla_dist.replay.wire import Command
from vla_dist.replay.writing import SegmentWriter

_PATIENCE_S = 10.0
"""For calls that no caller gives a timeout."""


class RedisReplayTable:
    """A client of one table of a buffer; implements ``core.protocols.ReplayTable``.

    Construct one in each process from a URL and the config: it holds connections and must not be pickled. Threads may
    share it. Appends go to the buffer, so to all of its tables.
    """

    def __init__(
        self,
        url: str,
        spec: EnvSpec,
        config: BufferConfig,
        *,
        table: str | None = None,
        seed: int = 0,
        images_url: str | None = None,
        shard: tuple[int, int] | None = None,
    ) -> None:
        """Create the buffer where it does not exist.

        Args:
            url: ``unix://...``, ``redis://...`` or ``rediss://...``, user and password included.
            spec: contract of the robots whose episodes it holds.
            config: see ``BufferConfig``.
            table: the one to sample from; None: the first.
            seed: of this client's draws; readers of one run need different ones.
            images_url: another server for the images, one that need not log them; None: the same.
            shard: (i, N) where this is part i of a buffer over N servers, see ``ShardedReplayTable``, which splits the
                config.

        Raises:
            ConfigError: settings that cannot work, or differ from those the buffer was created with.
            NotFound: no such table.
            Unreachable: no server within 10 s.
        """
        place, self._num_shards = shard or (None, 1)
        config.require_capacity(spec, num_shards=self._num_shards)
        self.spec = spec
        self.config = config
        self.codec = SegmentCodec(spec, config.num_steps, config.image_encodings)
        self.table = config.tables[config.table_index(table or config.tables[0].name)]
        self._index = config.table_index(self.table.name)
        self.keys = Keys(config.name, place)
        self.link = RedisLink(url)
        self.images_link = self.link if images_url is None else RedisLink(images_url)
        apart = images_url is not None
        self._writer = SegmentWriter(self.link, self.images_link if apart else None, self.codec, self.keys)
        try:
            self._create(images_apart=apart)
        except VlaDistError:
            self.close()
            raise
        self.reader = EpisodeReader(self.link, self.images_link, self.codec, self.keys)
        cameras = len(spec.cameras)
        self._images_gone = ImagesGone(self.link, self.images_link, self.keys, cameras) if apart and cameras else None
        self._losses = LossCheck(
            self.reader, self.link, self.images_link, self.keys, num_cameras=cameras, discard=self.discard
        )
        self.windows = WindowReader(self, table=self._index, seed=seed, losses=self._losses)
        """Draws of this client's table; for ``ShardedReplayTable``."""

    @classmethod
    def open(
        cls, url: str, name: str, *, context_steps: int = 20, table: str | None = None, images_url: str | None = None
    ) -> "RedisReplayTable":
        """A client of a buffer that exists, from what is stored with it; ``NAME:i`` is one shard of several.

        Raises:
            NotFound: no such buffer.
        """
        name, _, place = name.partition(":")
        link, keys = RedisLink(url), Keys(name, int(place) if place else None)
        try:
            identity, spec_json = link.call([("HMGET", keys.config, "identity", "spec_json")], timeout_s=_PATIENCE_S)[0]
        finally:
            link.close()
        if identity is None:
            raise NotFound(f"no buffer {keys.prefix!r} in Redis at {link.address}; `vla-dist replay stats` lists them")
        shard = (int(place), num_shards_of(identity.decode())) if place else None
        config = dataclasses.replace(buffer_from_identity(name, identity.decode()), context_steps=context_steps)
        spec = EnvSpec.from_json(spec_json.decode())
        return cls(url, spec, config, table=table, images_url=images_url, shard=shard)

    def append(self, segment: Segment, *, timeout_s: float) -> AppendResult:
        """Store once. The segments of an episode may come in any order; it is drawn from when none is missing.

        Raises:
            DataError: it does not fit the spec, or lies beyond the last segment of its episode.
            ReplayWait: a limiter, the archive or a full server refused for ``timeout_s``; append it again later.
            Unreachable: no answer; the segment may be appended again without harm.
        """
        return self._writer.append([segment], timeout_s=timeout_s)[0]

    def append_all(
        self,
        segments: Sequence[Segment],
        *,
        timeout_s: float,
        frames: Sequence[Mapping[str, bytes | memoryview]] | None = None,
    ) -> list[AppendResult]:
        """Store each once, many in one round trip: several times as fast as one by one.

        Errors as ``append``; what does not fit the spec is found before anything is sent. Where one contradicts its
        episode the others are stored. After ReplayWait or Unreachable append all of them again.

        Args:
            segments: of any episodes.
            timeout_s: for all of them together.
            frames: see ``SegmentCodec.encode_all``.
        """
        return self._writer.append(segments, timeout_s=timeout_s, frames=frames)

    def sample(self, num_windows: int, *, timeout_s: float) -> Batch:
        """B windows, each ending at a step that the table's sampler drew from the complete episodes.

        Raises:
            ReplayWait: the limiter refused for ``timeout_s``, or eviction outran the reader; the message holds the
                numbers.
            Unreachable: no answer.
        """
        return self.windows.sample(num_windows, timeout_s=timeout_s)

    def update_priorities(self, items: Array, priorities: Array, *, timeout_s: float = _PATIENCE_S) -> None:
        """New priorities of segments; those that left meanwhile are passed over.

        Args:
            items: (n,) int64 of ``Batch.items``.
            priorities: (n,) above 0, finite in float32; below 1e-6 they count as that. Of equal items the last counts.

        Raises:
            ConfigError: not a prioritised table, or numbers that are no priorities.
            Unreachable: no answer; it may be called again without harm.
        """
        priorities = np.asarray(priorities, np.float64)
        if self.table.kind != "prioritised":
            raise ConfigError(f"table {self.table.name!r} is {self.table.kind}: it has no priorities")
        possible = (priorities > 0) & (priorities <= np.finfo(np.float32).max)
        if len(items) != len(priorities) or not possible.all():
            raise ConfigError(
                f"{len(items)} items with {len(priorities)} priorities, {(~possible).sum()} of them not above 0 or not "
                "finite in float32; expected as many as items, and none of those"
            )
        # The server keeps them as float32, in which 0 stands for not scored.
        packed = np.stack([np.asarray(items, np.float64), np.maximum(priorities, 1e-6)], axis=1).astype("<f8").tobytes()
        self.link.call([self.function("reprioritise", self._index, packed)], timeout_s=timeout_s)

    def has_episode(self, episode_id: str) -> bool:
        """Whether the buffer ever took that episode whole, evicted or not; ``remembered_episodes`` bounds "ever"."""
        return bool(self.link.call([self.function("has", episode_id)], timeout_s=_PATIENCE_S)[0])

    def stats(self) -> TableStats:
        """Counters, now. Raises Unreachable."""
        packed, by, info = self.link.call(
            [("GET", self.keys.state), ("HGETALL", self.keys.by), ("INFO", "memory")], timeout_s=_PATIENCE_S
        )
        state = BufferState.unpack(packed, self.config.name)
        mine = state.tables[self._index]
        counters = {key.decode(): int(value) for key, value in zip(by[::2], by[1::2], strict=True) if int(value)}
        memory = dict(line.split(":", 1) for line in info.decode().split("\r\n") if ":" in line)
        return TableStats(
            num_steps=state.steps,
            num_episodes=state.complete,
            steps_inserted=state.inserted,
            steps_sampled=mine.sampled,
            duplicates=state.duplicates,
            inserts_waited=mine.inserts_waited,
            samples_waited=mine.samples_waited,
            steps_by_source={
                source: counters[f"source:{n}"] for n, source in enumerate(SOURCES) if f"source:{n}" in counters
            },
            episodes_by_task={
                key.removeprefix("task:"): value for key, value in counters.items() if key.startswith("task:")
            },
            num_bytes=int(memory["used_memory"]),
            episodes_discarded=state.discarded,
        )

    def state(self) -> BufferState:
        """All counters of the buffer and its tables, now. Raises Unreachable."""
        return BufferState.unpack(
            self.link.call([("GET", self.keys.state)], timeout_s=_PATIENCE_S)[0], self.config.name
        )

    def limiter_state(self) -> LimiterState:
        """The limiter's numbers, now. Raises Unreachable."""
        return self.state().tables[self._index].limiter

    def override_limiter(self, limiter: LimiterConfig) -> None:
        """Put another limiter in force for every client of the table, balance zero; the buffer's identity keeps the
        one it was created with.

        Raises:
            ConfigError: ``min_steps`` that the capacity can never hold, a ratio that a FIFO table cannot have.
        """
        table = dataclasses.replace(self.table, limiter=limiter)
        dataclasses.replace(self.config, tables=(table,)).require_capacity(self.spec, num_shards=self._num_shards)
        fields = (limiter.min_steps, ratio_field(limiter.samples_per_insert), float(limiter.error_buffer_steps))
        self.link.call([self.function("override", self._index, *fields)], timeout_s=_PATIENCE_S)

    def episodes(self, limit: int | None = None) -> Iterator[list[Segment]]:
        """Complete episodes, in the order they became whole, each as its segments in order.

        Episodes evicted meanwhile are left out.

        Args:
            limit: most episodes to give; None: all.
        """
        given = 0
        for entry in self.reader.entries(timeout_s=_PATIENCE_S):
            if limit is not None and given >= limit:
                return
            segments = self.read_episode(entry, timeout_s=_PATIENCE_S)
            if segments:
                given += 1
                yield segments

    def read_episode(self, entry: Entry, *, timeout_s: float) -> list[Segment]:
        """The segments of an episode; empty where it is gone, because it was evicted, or just now discarded because a
        part of its payload is missing.

        Raises:
            IntegrityError: a damaged segment, named.
            Unreachable: no answer.
        """
        try:
            return self.reader.read(entry, timeout_s=timeout_s)
        except PayloadMissing:
            self.discard_incomplete(timeout_s=timeout_s)
        return self.reader.read(entry, timeout_s=timeout_s)

    def discard(self, completion: int) -> bool:
        """Remove a damaged episode for good; whether it was there. ``BufferState.discarded`` counts them."""
        return bool(self.call_removing(self.function("discard", completion), timeout_s=_PATIENCE_S))

    def discard_incomplete(self, *, timeout_s: float = _PATIENCE_S) -> int:
        """Look at all episodes and discard those that lack a part of their payload; returns how many.

        Blocking: a second more than the look takes, if any lacks something: its writer may still be at it.
        """
        return self._losses.look_to_the_end(timeout_s=timeout_s)

    def close(self) -> None:
        """Close the connections; what is stored stays."""
        self._writer.close()
        self.link.close()
        self.images_link.close()

    def function(self, verb: str, *args: Any) -> Command:
        """The call of one of the buffer's functions, see ``functions.lua``."""
        return ("FCALL", function_name(verb), 1, self.keys.state, *args)

    def call_removing(self, command: Command, *, timeout_s: float) -> Any:
        """Answer of a function that may remove episodes; their images on another server are removed as well."""
        if self._images_gone is None:
            return self.link.call([command], timeout_s=timeout_s)[0]
        answer, gone = self.link.call([command, self._images_gone.command], timeout_s=timeout_s)
        self._images_gone.remove(gone, timeout_s=timeout_s)
        return answer

    def when_inserts_wait(self, action: Callable[[], None]) -> None:
        """For ``ShardedReplayTable``: what to do each time before an append is tried again."""
        self._writer.on_wait = action

    def _create(self, *, images_apart: bool) -> None:
        config = self.config
        # Of a cluster, the functions must be on the node that this finds.
        self.link.call([("EXISTS", self.keys.state)], timeout_s=_PATIENCE_S)
        self.link.require_functions(timeout_s=_PATIENCE_S)
        shards = self._num_shards
        identity = config.identity(self.spec, self.codec, images_apart=images_apart, num_shards=shards)
        packed = config.packed(self.spec, images_apart=images_apart, num_shards=shards)
        groups = [other.name for other in config.tables if isinstance(other.sampler, Fifo)]
        create = self.function("create", identity, self.spec.to_json(), packed, *groups)
        stored = self.link.call([create], timeout_s=_PATIENCE_S)[0]
        require_same_identity(config.name, identity, stored.decode())
