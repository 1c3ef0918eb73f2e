"""The whole system as programs of the simulation: who asks whom for what, and what each of it costs.

Costs are seconds of one core, measured (``costs.py``); what follows from them, queues and waits included, is simulated.
Left out: the kernel's own work for packets, memory bandwidth, and everything that happens once a minute.
"""

import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from scale_parts.kernel import Host, Program, Server, Signal, Simulation, ask, gather, sleep, until, work


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Core seconds of single parts, of one preset."""

    rollout_s: float
    """Of a rollout worker for one step, simulator and upload included."""
    rollout_steps: float
    """That it appends together."""
    insert_s: float
    """Of a replay server for one step."""
    follow_s: float
    """Of a replay server to make one new step known to one reader, who fetches its row once."""
    sample_s: float
    """Of a replay server for one batch of a reader that has its rows."""
    load_s: float
    """Of a rank's loader for one batch."""
    read_s: float
    """Of a rank's loader for one new step."""
    update_s: float
    """Of a rank for one update."""
    num_parameters: int
    gateway_s: float
    """Of HAProxy for one call."""
    loop_s: float
    """Of a replica's event loop for one call."""
    batch_s: float
    row_s: float
    """Of a replica to compute a batch: ``batch_s`` and ``row_s`` for each row of it."""
    client_s: float
    """Of a robot for one call."""
    ingest_s: float
    """Of a replica for one uploaded step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How many of each part there are, and on what."""

    rollouts: int = 0
    ranks: int = 0
    robots: int = 0
    replicas: int = 1
    gateways: int = 1
    shards: int = 1
    batch_size: int = 64
    """Windows of an update, over all ranks."""
    batch_of_costs: int = 64
    """Windows that ``load_s``, ``sample_s`` and ``update_s`` were measured with."""
    samples_per_insert: float = 4.0
    buffer_windows: float = 2_000.0
    """Of the limiter."""
    segment_steps: int = 32
    hz: float = 10.0
    update_speed: float = 1.0
    """How many times faster than the measured core a rank's device computes an update."""
    link_s: float = 0.0
    """One way between robots and gateway, and between machines."""
    gbit_per_s: float = 25.0
    """Between ranks of different machines."""
    cores: float = 0.0
    """0: each part has cores of its own, as on a cluster. Otherwise all of them share one machine with so many."""
    max_batch: int = 16
    deadline_s: float = 0.0
    """Answers that take longer are misses; 0: a period of control."""


@dataclass(slots=True, kw_only=True)
class Outcome:
    """Rates over the measured time."""

    steps_per_s: float
    """Inserted by rollout workers and robots."""
    updates_per_s: float
    windows_per_s: float
    calls_per_s: float
    p50_ms: float
    p99_ms: float
    missed: float
    """Share of calls that were answered late."""
    load: dict[str, float] = field(default_factory=dict)
    """Part -> share of its time that it is busy; of ranks, that they do not wait for data."""


_LATENCY_S = 50e-6
"""Of one message between ranks."""
_BYTES = 4


class System:
    """One layout, simulated for a while."""

    def __init__(self, costs: Costs, layout: Layout, *, seed: int = 0) -> None:
        self._costs, self._layout = costs, layout
        self._simulation = Simulation()
        self._random = random.Random(seed)
        shared = Host(layout.cores) if layout.cores else None
        self._make_host: Callable[[float], Host] = lambda cores: shared or Host(cores)
        self._shards = [Server(self._make_host(1)) for _ in range(layout.shards)]
        self._changed = Signal()
        self._steps = self._windows = self._updates = 0.0
        self._rank_busy_s = 0.0
        self._calls: list[tuple[float, float]] = []
        """(when it was answered, how long that took) of each."""
        self._gateways = [_Gateway(self._make_host(4)) for _ in range(layout.gateways)]
        self._replicas = [_Replica(self._make_host(2)) for _ in range(layout.replicas)]

    def run(self, *, warm_up_s: float, seconds: float) -> Outcome:
        for index in range(self._layout.rollouts):
            self._simulation.start(self._rollout(index))
        ring = _Barrier(self._layout.ranks)
        for index in range(self._layout.ranks):
            batches = _Batches()
            self._simulation.start(self._loader(index, batches))
            self._simulation.start(self._rank(batches, ring))
        for replica in self._replicas:
            self._simulation.start(self._compute(replica))
        for index in range(self._layout.robots):
            self._simulation.start(self._robot(index))
        self._simulation.run(warm_up_s)
        before, busy = (self._steps, self._windows, self._updates), self._busy()
        rank_busy = self._rank_busy_s
        self._simulation.run(warm_up_s + seconds)
        steps, windows, updates = (
            (now - then) / seconds
            for now, then in zip((self._steps, self._windows, self._updates), before, strict=True)
        )
        load = {part: max(0.0, now - busy[part]) / seconds for part, now in self._busy().items()}
        if self._layout.ranks:
            load["learner"] = (self._rank_busy_s - rank_busy) / seconds / self._layout.ranks
        took = np.array([took for when, took in self._calls if when >= warm_up_s] or [0.0])
        deadline_s = self._layout.deadline_s or 1 / self._layout.hz
        return Outcome(
            steps_per_s=steps,
            updates_per_s=updates,
            windows_per_s=windows,
            calls_per_s=len(took) / seconds if self._layout.robots else 0.0,
            p50_ms=float(np.percentile(took, 50)) * 1000,
            p99_ms=float(np.percentile(took, 99)) * 1000,
            missed=float((took > deadline_s).mean()),
            load=load,
        )

    def _busy(self) -> dict[str, float]:
        """Seconds of work that the busiest of each part has done, whatever else shares its machine."""
        busy = {"replay": max(server.busy_s for server in self._shards)}
        if self._layout.robots:
            busy["gateway"] = max(gateway.busy_s / 4 for gateway in self._gateways)
            # Batches grow with the load: what counts is how long the same rows would take in full ones.
            costs = self._costs
            full_call_s = costs.loop_s + costs.row_s + costs.batch_s / self._layout.max_batch
            busy["replica"] = max(replica.rows for replica in self._replicas) * full_call_s
        return busy

    # The limiter: see replay/limiter.py.

    def _may_insert(self) -> bool:
        balance = self._steps * self._layout.samples_per_insert - self._windows
        return not self._layout.ranks or balance <= self._layout.buffer_windows

    def _may_sample(self) -> bool:
        return self._windows - self._steps * self._layout.samples_per_insert <= self._layout.buffer_windows

    def _rollout(self, index: int) -> Program:
        costs, host = self._costs, self._make_host(1)
        shard = self._shards[index % len(self._shards)]
        # They do not begin together.
        yield sleep(self._random.random() * costs.rollout_s * costs.rollout_steps)
        while True:
            yield work(host, costs.rollout_s * costs.rollout_steps)
            while not self._may_insert():
                yield until(self._changed)
            yield sleep(self._layout.link_s)
            yield ask(shard, costs.insert_s * costs.rollout_steps)
            yield sleep(self._layout.link_s)
            self._insert(costs.rollout_steps)

    def _insert(self, steps: float) -> None:
        self._steps += steps
        self._changed.fire(self._simulation)

    def _loader(self, index: int, batches: "_Batches") -> Program:
        """Keeps two batches ahead of its rank."""
        costs, layout, host = self._costs, self._layout, self._make_host(1)
        share = layout.batch_size / layout.ranks
        size = share / layout.batch_of_costs
        known = self._steps
        while True:
            while not self._may_sample():
                yield until(self._changed)
            self._windows += share
            self._changed.fire(self._simulation)
            new, known = self._steps - known, self._steps
            fetched = new * self._share_fetched()
            served = costs.sample_s * size + costs.follow_s * fetched
            yield sleep(layout.link_s)
            yield gather(*(ask(shard, served / layout.shards) for shard in self._shards))
            yield sleep(layout.link_s)
            yield work(host, costs.load_s * size + costs.read_s * fetched)
            while batches.count >= 2:
                yield until(batches.changed)
            batches.count += 1
            batches.changed.fire(self._simulation)

    def _share_fetched(self) -> float:
        """Of all rows, those that one of so many readers ever draws; the cost of following was measured with one.

        A row is drawn ``samples_per_insert`` x T times in its life, by all readers together.
        """
        draws = self._layout.samples_per_insert * self._layout.segment_steps
        return (1 - math.exp(-draws / self._layout.ranks)) / (1 - math.exp(-draws))

    def _rank(self, batches: "_Batches", ring: "_Barrier") -> Program:
        costs, layout, host = self._costs, self._layout, self._make_host(1)
        compute = costs.update_s * layout.batch_size / layout.ranks / layout.batch_of_costs / layout.update_speed
        exchange = _exchange_s(costs.num_parameters, layout) if not layout.cores else 0.0
        while True:
            while not batches.count:
                yield until(batches.changed)
            batches.count -= 1
            batches.changed.fire(self._simulation)
            began = self._simulation.now
            yield work(host, compute)
            yield ring.wait()
            yield sleep(exchange)
            self._rank_busy_s += self._simulation.now - began
            self._updates += 1 / layout.ranks

    def _robot(self, index: int) -> Program:
        costs, layout = self._costs, self._layout
        own = self._make_host(1)
        gateway = self._gateways[index % len(self._gateways)]
        replica = self._replicas[index % len(self._replicas)]
        shard = self._shards[index % len(self._shards)]
        # Neither their periods nor their segments begin together.
        period, recorded = 1 / layout.hz, self._random.randrange(layout.segment_steps)
        due = self._random.random() * period
        while True:
            yield sleep(max(0.0, due - self._simulation.now))
            began = self._simulation.now
            yield work(own, costs.client_s / 2)
            yield sleep(layout.link_s)
            yield work(gateway.host, costs.gateway_s / 2)
            yield ask(replica.thread, costs.loop_s / 2)
            answered = Signal()
            replica.waiting.append((began + period, answered))
            replica.arrived.fire(self._simulation)
            yield until(answered)
            yield ask(replica.thread, costs.loop_s / 2)
            yield work(gateway.host, costs.gateway_s / 2)
            gateway.busy_s += costs.gateway_s
            yield sleep(layout.link_s)
            yield work(own, costs.client_s / 2)
            self._calls.append((self._simulation.now, self._simulation.now - began))
            recorded += 1
            if recorded == layout.segment_steps:
                recorded = 0
                self._simulation.start(self._upload(replica, shard))
            # One period behind at most: what was missed is not asked for again.
            due = max(due + period, self._simulation.now - period)

    def _upload(self, replica: "_Replica", shard: Server) -> Program:
        costs, steps = self._costs, self._layout.segment_steps
        yield work(replica.thread.host, costs.ingest_s * steps)
        yield ask(shard, costs.insert_s * steps)
        self._insert(steps)

    def _compute(self, replica: "_Replica") -> Program:
        """The batcher: the most urgent ones together, as many as fit."""
        costs = self._costs
        while True:
            while not replica.waiting:
                yield until(replica.arrived)
            batch = [replica.waiting.popleft() for _ in range(min(self._layout.max_batch, len(replica.waiting)))]
            yield ask(replica.thread, costs.batch_s + costs.row_s * len(batch))
            replica.rows += len(batch)
            for _, answered in batch:
                answered.fire(self._simulation)


@dataclass(slots=True)
class _Gateway:
    host: Host
    busy_s: float = 0.0


class _Replica:
    def __init__(self, host: Host) -> None:
        # Its event loop and the thread that computes are one here: they share the interpreter's lock, which a small
        # model hardly ever leaves.
        self.thread = Server(host)
        # Robots have the same rate, so that the earliest deadline is that of who came first.
        self.waiting: deque[tuple[float, Signal]] = deque()
        self.arrived = Signal()
        self.rows = 0


class _Batches:
    def __init__(self) -> None:
        self.count = 0
        self.changed = Signal()


class _Barrier:
    """Ranks go on together."""

    def __init__(self, count: int) -> None:
        self._count, self._here, self._open = count, 0, Signal()

    def wait(self):
        def wait(simulation: Simulation, resume) -> None:
            self._open.add(resume)
            self._here += 1
            if self._here == self._count:
                self._here = 0
                self._open.fire(simulation)

        return wait


def _exchange_s(num_parameters: int, layout: Layout) -> float:
    """A ring that averages the gradients of all ranks: 2 (G - 1) / G of them over each link.

    Source: Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms", section 3.
    """
    ranks = layout.ranks
    if ranks == 1:
        return 0.0
    sent = 2 * (ranks - 1) / ranks * num_parameters * _BYTES
    return sent / (layout.gbit_per_s * 1e9 / 8) + 2 * (ranks - 1) * _LATENCY_S


def simulate(costs: Costs, layout: Layout, *, warm_up_s: float = 2.0, seconds: float = 6.0, seed: int = 0) -> Outcome:
    return System(costs, layout, seed=seed).run(warm_up_s=warm_up_s, seconds=seconds)
