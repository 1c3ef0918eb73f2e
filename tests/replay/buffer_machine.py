"""Histories of one buffer: what its clients do in any order, beside a plain Python model of it."""

import itertools
import os
import signal
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from buffer_model import BufferModel, Contradiction, Wait
from chaos.ground_truth import (
    IMAGE_ENCODINGS,
    MAX_LENGTH,
    SPEC,
    require_true_episode,
    require_true_window,
    true_episode,
)
from chaos.stage import CACHE_BYTES
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from vla_dist.core.errors import ConfigError, DataError, ReplayWait
from vla_dist.core.types import Segment
from vla_dist.replay.config import BufferConfig, Fifo, Prioritised, TableConfig
from vla_dist.replay.keys import episode_digest
from vla_dist.replay.limiter import LimiterConfig
from vla_dist.replay.queue import EpisodeQueue
from vla_dist.replay.server import EmbeddedServer
from vla_dist.replay.table import RedisReplayTable

T, K = 4, 6
PATIENCE_S = 10.0
LIMITERS = (
    LimiterConfig(),
    LimiterConfig(min_steps=6),
    LimiterConfig(samples_per_insert=0.5, error_buffer_steps=4),
    LimiterConfig(min_steps=8, samples_per_insert=2.0, error_buffer_steps=30),
    LimiterConfig(samples_per_insert=1.0, error_buffer_steps=0),
)
PRIORITISED = Prioritised(alpha=1.0, beta=1.0)
TABLES = (
    (
        TableConfig(name="uniform"),
        TableConfig(name="scored", sampler=PRIORITISED),
        TableConfig(name="q", sampler=Fifo()),
    ),
    (
        TableConfig(name="uniform", limiter=LIMITERS[3]),
        TableConfig(name="q", sampler=Fifo(), limiter=LimiterConfig(samples_per_insert=1.0, error_buffer_steps=20)),
    ),
    (TableConfig(name="few", max_draws=3), TableConfig(name="q", sampler=Fifo())),
    (
        TableConfig(name="few", max_draws=2, limiter=LIMITERS[2]),
        TableConfig(name="scored", sampler=PRIORITISED, max_draws=4),
    ),
)
_names = (f"model-{number}" for number in itertools.count())


class BufferMachine(RuleBasedStateMachine):
    server: EmbeddedServer

    @initialize(
        tables=st.sampled_from(TABLES),
        capacity=st.sampled_from([2 * MAX_LENGTH + 8, 3 * MAX_LENGTH, 10 * MAX_LENGTH]),
        remembered=st.sampled_from([3, 1000]),
        seed=st.integers(0, 1000),
        trims=st.booleans(),
    )
    def begin(self, tables, capacity, remembered, seed, trims):
        self.trims = trims
        self.config = BufferConfig(
            name=next(_names),
            num_steps=T,
            context_steps=K,
            capacity_steps=capacity,
            remembered_episodes=remembered,
            image_encodings=IMAGE_ENCODINGS,
            tables=tables,
        )
        self.model = BufferModel(self.config)
        self.seed = seed
        self.begun = 0
        self.clients = {table.name: self.connect(table.name) for table in tables}
        self.writer = self.connect(None)
        self.queues = {}
        self.handed_out = {}

    def connect(self, table: str | None) -> RedisReplayTable:
        self.seed += 1
        config = replace(self.config, cache_bytes=CACHE_BYTES[self.seed % len(CACHE_BYTES)])
        return RedisReplayTable(self.server.url, SPEC, config, table=table, seed=self.seed)

    def segment(self, back: int, index: int) -> Segment:
        """Of the newest episode, or one that began before it; 0 begins a new one."""
        number = max(0, self.begun - back)
        self.begun = max(self.begun, number + 1)
        truth = true_episode(f"episode-{number}")
        return truth.segment(index % truth.num_segments(T), T)

    def append(self, segments: list[Segment]) -> None:
        """To both, and compare what they say."""
        results, expected = [], None
        for segment in segments:
            try:
                results.append(self.model.insert(segment))
            except Contradiction:
                expected = expected or DataError
            except Wait:
                expected = ReplayWait
                break
        if expected is None:
            assert self.writer.append_all(segments, timeout_s=PATIENCE_S) == results
        else:
            with pytest.raises(expected):
                self.writer.append_all(segments, timeout_s=0.0 if expected is ReplayWait else PATIENCE_S)

    @rule(back=st.integers(0, 6), index=st.integers(0, MAX_LENGTH // T))
    def append_one(self, back, index):
        self.append([self.segment(back, index)])

    @rule(picks=st.lists(st.tuples(st.integers(0, 5), st.integers(0, MAX_LENGTH // T)), min_size=1, max_size=12))
    def append_several(self, picks):
        self.append([self.segment(*pick) for pick in picks])

    @rule(
        backs=st.lists(st.sampled_from([0, 0, 0, 1, 2, 3, 4]), min_size=1, max_size=6),
        order=st.randoms(use_true_random=False),
    )
    def append_whole_episodes(self, backs, order):
        ids = dict.fromkeys(self.segment(back, 0).episode_id for back in backs)
        segments = [segment for episode_id in ids for segment in true_episode(episode_id).segments(T)]
        order.shuffle(segments)
        self.append(segments)

    @rule(num=st.integers(2, 6))
    def append_one_episode_after_the_other(self, num):
        for _ in range(num):
            self.append(true_episode(self.segment(0, 0).episode_id).segments(T))

    @rule(back=st.integers(1, 6), length=st.integers(1, MAX_LENGTH), index=st.integers(0, 4), and_then=st.booleans())
    def append_contradiction(self, back, length, index, and_then):
        """A segment of another episode under the same id; what follows must not be touched by it."""
        own = self.segment(back, index)
        other = true_episode(own.episode_id, length)
        wrong = other.segment(index % other.num_segments(T), T)
        if self.model.contradicts(wrong):
            self.append([wrong, own] if and_then else [wrong])

    @rule(data=st.data(), num=st.integers(1, 24))
    def sample(self, data, num):
        table = data.draw(st.sampled_from([t for t in self.model.tables if not t.is_queue]))
        client = self.clients[table.config.name]
        if self.model.sample_waits(table):
            table.samples_waited += 1
            with pytest.raises(ReplayWait, match="limiter"):
                client.sample(num, timeout_s=0.0)
            return
        most = table.config.max_draws
        allowed = {row: most - table.draws.get(row, 0) if most else num for row, _, _ in self.model.live_rows(table)}
        if most is not None:
            num = min(num, sum(allowed.values()))
        batch = client.sample(num, timeout_s=PATIENCE_S)
        self.model.charge(table, num)
        self.compare_copy_of_index(table, client)
        assert batch.num_windows == num
        by_id = {episode.id: (row - index, episode) for row, episode, index in self.model.live_rows(table)}
        rows = []
        for b, name in enumerate(batch.instructions):
            assert name in by_id, f"{name} was drawn: it is not stored, not whole, or used up"
            end = require_true_window(batch, b, true_episode(name), num_steps=T)
            rows.append(by_id[name][0] + end // T)
        assert batch.items.tolist() == rows
        assert not Counter(rows) - Counter(allowed)
        self.compare_weights(table, batch.weights, rows)
        for row, name in zip(rows, batch.instructions, strict=True):
            self.model.draw(table, row, by_id[name][1])

    def compare_copy_of_index(self, table, client):
        """A stale row would show only as a window that is drawn twice."""
        if table.config.max_draws is None:  # Else this very sample has used rows up.
            rows = client.windows._follower.index.rows
            live = rows["number"][rows["length"] > 0]
            assert set(live.tolist()) == {row for row, _, _ in self.model.live_rows(table)}
            assert client.windows._follower.index.live_steps == self.model.drawable(table)

    def compare_weights(self, table, weights, rows):
        if not table.is_prioritised:
            assert weights is None
            return
        # With alpha and beta 1 the weight of a step is one over its segment's priority, up to a common factor.
        products = [w * table.priorities[row] for w, row in zip(weights, rows, strict=True) if row in table.scored]
        np.testing.assert_allclose(products, products[:1] * len(products), rtol=1e-4)

    @precondition(lambda self: any(t.is_prioritised for t in self.model.tables) and self.model.rows)
    @rule(data=st.data(), num=st.integers(1, 6))
    def set_priorities(self, data, num):
        table = next(t for t in self.model.tables if t.is_prioritised)
        first = max(0, self.model.rows - self.config.capacity_steps)
        rows = data.draw(st.lists(st.integers(first, self.model.rows - 1), min_size=num, max_size=num))
        values = data.draw(st.lists(st.sampled_from([0.01, 0.5, 1.0, 3.0, 40.0]), min_size=num, max_size=num))
        self.clients[table.config.name].update_priorities(np.array(rows), np.array(values))
        for row, value in zip(rows, values, strict=True):
            self.model.reprioritise(table, row, value)

    @precondition(lambda self: any(t.is_queue for t in self.model.tables))
    @rule(consumer=st.sampled_from("ab"), num=st.integers(1, 4), restarted=st.booleans())
    def take(self, consumer, num, restarted):
        table = next(t for t in self.model.tables if t.is_queue)
        if restarted or consumer not in self.queues:
            self.queues[consumer] = EpisodeQueue(self.clients[table.config.name], consumer)
            self.handed_out[consumer] = {}
        queue, handed_out = self.queues[consumer], self.handed_out[consumer]
        mine, fresh = self.model.takeable(table, consumer)
        mine = [completion for completion in mine if completion not in handed_out]
        if mine or fresh:
            taken = queue.take(num, timeout_s=PATIENCE_S)
        else:
            taken = []
            with pytest.raises(ReplayWait, match="no whole episode"):
                queue.take(num, timeout_s=0.0)
        completions = [episode.completion for episode in taken]
        own = [completion for completion in completions if completion in mine]
        assert own == mine[: len(own)]
        assert completions[len(own) :] == fresh[: len(completions) - len(own)]
        assert len(completions) <= num
        self.model.take(table, consumer, completions)
        for episode in taken:
            truth = true_episode(self.model.complete[episode.completion].id)
            require_true_episode(list(episode.segments), truth, num_steps=T)
            handed_out[episode.completion] = episode

    @precondition(lambda self: any(self.handed_out.values()))
    @rule(data=st.data())
    def acknowledge(self, data):
        table = next(t for t in self.model.tables if t.is_queue)
        consumer = data.draw(st.sampled_from([name for name, mine in self.handed_out.items() if mine]))
        mine = self.handed_out[consumer]
        completions = data.draw(st.lists(st.sampled_from(sorted(mine)), min_size=1, unique=True))
        episodes = [mine.pop(completion) for completion in completions]
        fresh = self.queues[consumer].acknowledge(episodes)
        expected, evicted = self.model.acknowledge(table, completions)
        # What was evicted meanwhile may have been forgotten.
        assert expected - evicted <= fresh <= expected
        assert self.queues[consumer].acknowledge(episodes) == 0

    @rule(data=st.data(), limiter=st.sampled_from(LIMITERS))
    def override_limiter(self, data, limiter):
        table = data.draw(st.sampled_from(self.model.tables))
        client = self.clients[table.config.name]
        if isinstance(table.config.sampler, Fifo) and limiter.samples_per_insert not in (None, 1):
            with pytest.raises(ConfigError, match="a FIFO table gives each step once"):
                client.override_limiter(limiter)
            return
        client.override_limiter(limiter)
        self.model.override(table, limiter)

    @precondition(lambda self: self.model.complete)
    @rule(data=st.data())
    def discard(self, data):
        chosen = st.lists(st.sampled_from(sorted(self.model.complete)), min_size=1, max_size=3, unique=True)
        for completion in data.draw(chosen):
            assert self.writer.discard(completion)
            assert not self.writer.discard(completion)
            self.model.evict(self.model.complete[completion])

    def call(self, verb, *args):
        return self.writer.link.call([self.writer.function(verb, *args)], timeout_s=PATIENCE_S)[0]

    @rule(on=st.booleans())
    def switch_archiving(self, on):
        self.call("archiving", int(on))
        self.model.archiving = on

    @precondition(lambda self: self.model.completions > self.model.archived)
    @rule(data=st.data())
    def archive(self, data):
        before = self.model.archived
        reached = data.draw(st.integers(before + 1, self.model.completions))
        assert self.call("plan_archive", before, "a plan") == [b"OK", b"a plan"]
        assert self.call("finish_archive", before, reached, "a plan") == 1
        self.model.finish_archive(reached)

    @rule(data=st.data())
    def open_another_client(self, data):
        name = data.draw(st.sampled_from(sorted(self.clients)))
        if not self.model.tables[self.config.table_index(name)].is_queue:
            self.clients[name].close()
            self.clients[name] = self.connect(name)

    @invariant()
    def streams_hold_little(self):
        """A reader that fell behind must start again from what is stored."""
        if self.trims:
            names = ["gone", *(f"events:{number}" for number in range(len(self.model.tables)))]
            trims = [("XTRIM", self.writer.keys.prefix + name, "MAXLEN", 1) for name in names]
            self.writer.link.call(trims, timeout_s=PATIENCE_S)

    @rule()
    def read_everything_back(self):
        found = list(self.writer.episodes())
        assert [segments[0].episode_id for segments in found] == [e.id for e in self.model.complete.values()]
        for segments in found:
            require_true_episode(segments, true_episode(segments[0].episode_id), num_steps=T)
        for episode in self.model.known.values():
            assert self.writer.has_episode(episode.id) == episode.whole
        stats = self.writer.stats()
        whole = [true_episode(episode.id) for episode in self.model.complete.values()]
        assert stats.episodes_by_task == Counter(truth.task for truth in whole)
        steps = Counter()
        for truth in whole:
            steps[truth.source] += truth.length
        assert stats.steps_by_source == steps

    @invariant()
    def counters_are_those_of_the_model(self):
        state, model = self.writer.state(), self.model
        for name in ("steps", "inserted", "duplicates", "evicted_steps", "broken", "completions", "archived"):
            assert getattr(state, name) == getattr(model, name), name
        assert state.complete == len(model.complete)
        assert state.steps <= self.config.capacity_steps
        for mine, theirs in zip(state.tables, model.tables, strict=True):
            assert mine.limiter.config == theirs.limiter
            assert mine.limiter.drawable_steps == model.drawable(theirs)
            assert mine.limiter.balance == pytest.approx(theirs.balance, abs=1e-6)
            assert mine.limiter.samples_wait == model.sample_waits(theirs)
            for name in ("sampled", "inserts_waited", "samples_waited", "max_priority", "lost"):
                assert getattr(mine, name) == getattr(theirs, name), (theirs.config.name, name)

    @invariant()
    def complete_episodes_stand_in_their_order(self):
        entries = [(e["completion"], e["episode_id"]) for e in self.writer.reader.entries(timeout_s=PATIENCE_S)]
        assert entries == [(completion, episode.id) for completion, episode in self.model.complete.items()]

    @invariant()
    def priorities_are_as_last_set(self):
        for number, table in enumerate(self.model.tables):
            live = {row for row, _, _ in self.model.live_rows(table)}
            if table.is_prioritised and live:
                key = self.writer.keys.of_table("priorities", number)
                (ring,) = self.writer.link.call([("GETRANGE", key, 0, -1)], timeout_s=PATIENCE_S)
                values = np.frombuffer(ring, "<f4")
                for row in live:
                    assert values[row % self.config.capacity_steps] == np.float32(table.priorities[row]), row

    def keys_in_redis(self) -> dict[str, int]:
        """Of this buffer, with the milliseconds until they expire; -1 for never."""
        names, cursor = [], None
        while cursor != b"0":
            scan = ("SCAN", cursor or 0, "MATCH", f"{self.writer.keys.prefix}*", "COUNT", 1000)
            ((cursor, some),) = self.writer.link.call([scan], timeout_s=PATIENCE_S)
            names += some
        lives = self.writer.link.call([("PTTL", name) for name in names], timeout_s=PATIENCE_S)
        return dict(zip((name.decode() for name in names), lives, strict=True))

    def teardown(self):
        if not hasattr(self, "writer"):
            return
        try:
            self.require_nothing_else_stored()
        finally:
            for client in (self.writer, *self.clients.values()):
                client.close()

    def require_nothing_else_stored(self):
        keys = self.keys_in_redis()
        self.read_everything_back()
        stored = set()
        for episode in (e for e in self.model.known.values() if not e.evicted):
            digest = episode_digest(episode.id)
            for index in episode.segments:
                stored.add(self.writer.keys.row(digest, index))
                stored.update(self.writer.keys.image(digest, index, camera) for camera in range(len(SPEC.cameras)))
        payloads = {name for name, life in keys.items() if life == -1 and (":row:" in name or ":image:" in name)}
        assert payloads == stored, "what is stored for ever is what the model holds, no more and no less"
        self.writer.link.call([("UNLINK", *keys)], timeout_s=PATIENCE_S)


class RestartedBufferMachine(BufferMachine):
    """The same on a server that is killed now and then; no client is told."""

    @rule()
    def kill_and_restart_the_server(self):
        type(self).server = restarted(self.server)


def restarted(server: EmbeddedServer) -> EmbeddedServer:
    os.kill(server.pid, signal.SIGKILL)
    while server.alive:
        time.sleep(0.001)
    return EmbeddedServer(server.directory)
