"""dm-reverb: a server in its own process over TCP on localhost, in a virtual environment of its own.

    python benchmarks/replay_peers/dm_reverb.py --workload low_dim|image [--seconds 3] [--processes 1|2]

Every window of K = 20 steps of an episode is an item of a uniform, first-in-first-out table, so any of them can be
drawn, as from the other systems; the items share the chunks that hold the steps. A slice of inserting ends with the
writer's flush, and afterwards the server must have every item. The chunk length fixes what an insert and a sample cost;
each has its own best.
"""

import contextlib
import logging
import multiprocessing
import os
import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier

import numpy as np
import venvs
from workload import (
    EPISODE_STEPS,
    Arrays,
    K,
    Rates,
    Workload,
    best,
    measure_insert,
    measure_sample,
    parse,
    report,
)

# A slice of a trial must be long against the samples that a reader fetches ahead.
TRIAL_S = 1.5
TRIAL_STORED_STEPS = 2_560
START_TIMEOUT_S = 120.0
RUN_TIMEOUT_S = 500.0
CONFIRM_TIMEOUT_S = 10.0
TABLE = "windows"
CONTEXT = multiprocessing.get_context("spawn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """``kind``: the client's class; ``chunk``: steps in a chunk (StructuredWriter tunes its own)."""

    kind: str = "Writer"
    chunk: int = 10

    def __str__(self) -> str:
        return self.kind if self.kind == "StructuredWriter" else f"{self.kind}, chunks of {self.chunk}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """Client.sample's sampler if ``workers`` is 0, else TrajectoryDataset; ``in_flight`` counts samples a worker."""

    chunk: int
    workers: int
    in_flight: int
    stream: int = -1

    def __str__(self) -> str:
        kind = f"TrajectoryDataset, {self.workers} workers" if self.workers else "Sampler"
        return f"{kind}, {self.in_flight} in flight, {self.stream} a stream, chunks of {self.chunk}"


def writers(workload: Workload, every: bool) -> list[Writer]:
    if not every:
        return [Writer(chunk=chunk) for chunk in ((2, 5) if workload.name == "image" else (10, 20))]
    chunks = (2, 4, 5, 10, 20)
    kinds = [Writer(kind="StructuredWriter"), *(Writer(kind="TrajectoryWriter", chunk=chunk) for chunk in chunks)]
    return [*(Writer(chunk=chunk) for chunk in chunks), *kinds]


def readers(workload: Workload, every: bool) -> list[Reader]:
    batch = workload.windows
    if not every:
        chunks, settings = ((5, 10) if workload.name == "image" else (20, 40)), ((2, 16, -1), (4, batch, -1))
    else:
        chunks = (2, 5, 10, 20, 40)
        settings = (
            *((workers, batch, -1) for workers in (0, 1, 2, 4, 8)),
            (2, 16, -1),
            (2, 2 * batch, -1),
            (2, 2 * batch, 8 * batch),
        )
    return [Reader(chunk=c, workers=w, in_flight=f, stream=s) for c in chunks for w, f, s in settings]


def quiet() -> None:
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # A client process ends after its last flush; that its writer was not closed is no news.
    logging.getLogger("absl").setLevel(logging.ERROR)


def serve(pipe: Connection, capacity: int) -> None:
    """A server until the pipe closes; each message is answered with the items inserted so far."""
    quiet()
    import reverb

    table = reverb.Table(
        TABLE, reverb.selectors.Uniform(), reverb.selectors.Fifo(), capacity, reverb.rate_limiters.MinSize(1)
    )
    server = reverb.Server([table], port=None)
    pipe.send(server.port)
    with contextlib.suppress(EOFError):
        while True:
            pipe.recv()
            pipe.send(table.info.rate_limiter_info.insert_stats.completed)
    server.stop()


class Server:
    """A full table in a process of its own, filled with chunks of ``chunk`` steps."""

    def __init__(self, workload: Workload, chunk: int) -> None:
        self.pipe, child = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=serve, args=(child, workload.stored_steps), daemon=True)
        self.process.start()
        child.close()
        self.address = f"localhost:{self.answer()}"
        run_clients(self, workload, Writer(chunk=chunk), 0.0, processes=1)

    def answer(self) -> int:
        if not self.pipe.poll(START_TIMEOUT_S):
            raise TimeoutError(f"no answer of the reverb server in {START_TIMEOUT_S:.0f} s")
        return self.pipe.recv()

    def inserted(self) -> int:
        self.pipe.send("inserted")
        return self.answer()

    def stop(self) -> None:
        self.pipe.close()
        self.process.join(10.0)
        if self.process.is_alive():
            self.process.kill()


@contextlib.contextmanager
def server(workload: Workload, chunk: int) -> Iterator[Server]:
    running = Server(workload, chunk)
    try:
        yield running
    finally:
        running.stop()


def inserter(address: str, workload: Workload, writer: Writer) -> tuple[Callable[[], int], Callable[[], None]]:
    """One episode, with an item for each of its windows; and the writer's flush."""
    import reverb
    from reverb import structured_writer

    client, episode = reverb.Client(address), workload.episode()
    steps = [{name: column[t] for name, column in episode.items()} for t in range(EPISODE_STEPS)]
    rows = [tuple(step.values()) for step in steps]
    if writer.kind == "Writer":
        legacy = client.writer(max_sequence_length=max(K, writer.chunk), chunk_length=writer.chunk)

        def insert() -> int:
            for t, row in enumerate(rows):
                legacy.append(row)
                if t >= K - 1:
                    legacy.create_item(TABLE, K, 1.0)
            return EPISODE_STEPS

        return insert, legacy.flush
    if writer.kind == "StructuredWriter":
        reference = structured_writer.create_reference_step(dict.fromkeys(episode, 0))
        config = structured_writer.create_config(
            {name: reference[name][-K:] for name in episode}, TABLE, [structured_writer.Condition.step_index() >= K - 1]
        )
        structured = client.structured_writer([config])

        def insert() -> int:
            for step in steps:
                structured.append(step)
            structured.end_episode()
            return EPISODE_STEPS

        return insert, structured.flush
    kept = max(K, writer.chunk)
    trajectory = client.trajectory_writer(num_keep_alive_refs=kept, validate_items=False)
    for name in episode:
        trajectory.configure((name,), num_keep_alive_refs=kept, max_chunk_length=writer.chunk)

    def insert() -> int:
        for t, step in enumerate(steps):
            trajectory.append(step)
            if t >= K - 1:
                trajectory.create_item(TABLE, 1.0, {name: column[-K:] for name, column in trajectory.history.items()})
        # Without it the writer would keep any number of items that were not confirmed.
        trajectory.flush(200)
        return EPISODE_STEPS

    return insert, trajectory.flush


def sampler(address: str, workload: Workload, reader: Reader) -> Callable[[], Arrays]:
    """A batch of windows, as NumPy arrays (B, K, ...)."""
    import reverb
    import tensorflow as tf

    episode = workload.episode()
    if not reader.workers:
        stream = reverb.Client(address)._client.NewSampler(TABLE, 10**9, reader.in_flight)

        def sample() -> Arrays:
            items = [stream.GetNextTrajectory()[5:] for _ in range(workload.windows)]
            return {name: np.stack(column) for name, column in zip(episode, zip(*items, strict=True), strict=True)}

        return sample
    dataset = reverb.TrajectoryDataset(
        address,
        TABLE,
        tuple(tf.as_dtype(column.dtype) for column in episode.values()),
        tuple(tf.TensorShape((K, *column.shape[1:])) for column in episode.values()),
        max_in_flight_samples_per_worker=reader.in_flight,
        num_workers_per_iterator=reader.workers,
        max_samples_per_stream=reader.stream,
        rate_limiter_timeout_ms=20_000,
    )
    batches = dataset.batch(workload.windows, drop_remainder=True).as_numpy_iterator()
    return lambda: dict(zip(episode, next(batches).data, strict=True))


def work(
    address: str, workload: Workload, job: Writer | Reader, seconds: float, barrier: Barrier, answers: Queue
) -> None:
    """A client process: answers its rates and how many items it created. No seconds: fill the table once."""
    quiet()
    if isinstance(job, Reader):
        sample = sampler(address, workload, job)
        barrier.wait(START_TIMEOUT_S)
        answers.put((measure_sample(sample, workload.check, seconds), 0))
        return
    insert, finish = inserter(address, workload, job)
    steps = 0

    def counted() -> int:
        nonlocal steps
        steps += EPISODE_STEPS
        return insert()

    barrier.wait(START_TIMEOUT_S)
    rates = Rates()
    if seconds:
        rates = measure_insert(counted, finish, seconds)
    else:
        while steps // EPISODE_STEPS * (EPISODE_STEPS - K + 1) <= 1.05 * workload.stored_steps:
            counted()
        finish()
    answers.put((rates, steps // EPISODE_STEPS * (EPISODE_STEPS - K + 1)))


def next_answer(clients: list[SpawnProcess], answers: Queue) -> tuple[Rates, int]:
    """What ``work`` puts.

    Raises:
        RuntimeError: A client failed; its traceback is on stderr.
        TimeoutError: No answer in RUN_TIMEOUT_S.
    """
    end = time.monotonic() + RUN_TIMEOUT_S
    while time.monotonic() < end:
        with contextlib.suppress(queue.Empty):
            return answers.get(timeout=1.0)
        if failed := [client.exitcode for client in clients if client.exitcode]:
            raise RuntimeError(f"got exit codes {failed} of the reverb clients, expected 0: see stderr")
    raise TimeoutError(f"no answer of a reverb client in {RUN_TIMEOUT_S:.0f} s")


def run_clients(running: Server, workload: Workload, job: Writer | Reader, seconds: float, processes: int) -> Rates:
    """Steps/s of all clients together, slice by slice.

    Raises:
        RuntimeError: The server does not have every item that was created, or a client failed.
        TimeoutError: A client did not answer.
    """
    barrier, answers = CONTEXT.Barrier(processes), CONTEXT.Queue()
    before = running.inserted()
    arguments = (running.address, workload, job, seconds, barrier, answers)
    clients = [CONTEXT.Process(target=work, args=arguments, daemon=True) for _ in range(processes)]
    for client in clients:
        client.start()
    try:
        found = [next_answer(clients, answers) for _ in clients]
    finally:
        for client in clients:
            client.join(10.0)
            if client.is_alive():
                client.kill()
    created, end = sum(items for _, items in found), time.monotonic() + CONFIRM_TIMEOUT_S
    while (inserted := running.inserted() - before) < created and time.monotonic() < end:
        time.sleep(0.05)
    if inserted != created:
        raise RuntimeError(f"got {inserted} items in the table, expected the {created} that were created")
    return Rates(slices=[sum(together) for together in zip(*(rates.slices for rates, _ in found), strict=True)])


def try_writers(workload: Workload, candidates: list[Writer]) -> dict[str, float]:
    trials = {}
    for writer in candidates:
        with server(workload, writer.chunk) as running:
            trials[str(writer)] = run_clients(running, workload, writer, TRIAL_S, workload.processes).best
    return trials


def try_readers(workload: Workload, candidates: list[Reader]) -> dict[str, float]:
    trials = {}
    for chunk in dict.fromkeys(reader.chunk for reader in candidates):
        with server(workload, chunk) as running:
            for reader in (reader for reader in candidates if reader.chunk == chunk):
                trials[str(reader)] = run_clients(running, workload, reader, TRIAL_S, workload.processes).best
    return trials


def main() -> None:
    options = parse(__doc__)
    venvs.enter("dm_reverb", options.venvs)
    workload = options.workload
    insert_clients = {str(w): w for w in writers(workload, options.every_client)}
    sample_clients = {str(r): r for r in readers(workload, options.every_client)}
    trial = replace(workload, stored_steps=min(workload.stored_steps, TRIAL_STORED_STEPS))
    writer = insert_clients[best(try_writers(trial, list(insert_clients.values())), "insert")]
    reader = sample_clients[best(try_readers(trial, list(sample_clients.values())), "sample")]
    with server(workload, writer.chunk) as running:
        inserted = run_clients(running, workload, writer, workload.seconds, workload.processes).median
    with server(workload, reader.chunk) as running:
        sampled = run_clients(running, workload, reader, workload.seconds, workload.processes).median
    report(
        "dm-reverb",
        version("dm-reverb"),
        workload,
        insert=inserted,
        sample=sampled,
        client=f"insert {writer}; sample {reader}",
    )


if __name__ == "__main__":
    main()
