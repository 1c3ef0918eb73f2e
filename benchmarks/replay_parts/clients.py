"""Client processes that insert or sample on demand: through the table, or through the bare protocol.

The raw protocol is the limit: the same payload bytes in the same commands (SET; GETRANGE of the same ranges), packed
beforehand, sent and received through bare sockets into memory that is there already. No codec, no dedupe, no limiter,
no index, no arrays.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection
from typing import Literal

import numpy as np
from replay_parts.workload import EPISODE_SEGMENTS, K, T, Workload

from vla_dist.data.segment_codec import SegmentCodec
from vla_dist.data.windows import WindowPieces
from vla_dist.replay.table import RedisReplayTable
from vla_dist.replay.wire import Endpoint, pack

Work = Callable[[], int]
"""Does one insert or one sample, and returns its environment steps."""
_PREPARED = 24
_ANSWER_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a client process does."""

    system: Literal["table", "raw"]
    action: Literal["insert", "sample"]
    url: str
    images_url: str | None
    workload: Workload
    stored_steps: int = 0
    """Steps that a raw reader may read."""
    warm_up_s: float = 0.5
    """Work that is not measured."""


class Clients:
    """One or more processes that work at the same time."""

    def __init__(self, task: Task, num_processes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for number in range(num_processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(task, number, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)
        for pipe in self._pipes:
            _answer(pipe)

    def measure(self, seconds: float) -> float:
        """Steps a second of all of them together."""
        for pipe in self._pipes:
            pipe.send(seconds)
        return sum(_answer(pipe) for pipe in self._pipes)

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.send(None)
            process.join(10)


def _answer(pipe: Connection) -> float:
    if not pipe.poll(_ANSWER_S):
        raise TimeoutError(f"a client process of the benchmark gave no answer for {_ANSWER_S:.0f} s")
    return pipe.recv()


def _serve(task: Task, number: int, pipe: Connection) -> None:
    works = (_table_work if task.system == "table" else _raw_work)(task, f"{os.getpid()}-{number}")
    _rate(works, task.warm_up_s)
    pipe.send(0.0)
    while (seconds := pipe.recv()) is not None:
        pipe.send(_rate(works, seconds))


def _rate(works: Iterator[Work], seconds: float) -> float:
    """Steps a second of the work alone: what is only made for the benchmark is made between the measured calls."""
    steps, spent, end = 0, 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        for work in list(islice(works, _PREPARED)):
            started = time.perf_counter()
            steps += work()
            spent += time.perf_counter() - started
            if started > end:
                break
    return steps / spent


def _table_work(task: Task, writer: str) -> Iterator[Work]:
    workload = task.workload
    table = RedisReplayTable(
        task.url, workload.spec, workload.buffer, seed=hash(writer) % 2**31, images_url=task.images_url
    )
    if task.action == "sample":

        def sample() -> int:
            return table.sample(workload.windows, timeout_s=30.0).num_windows * K

        while True:
            yield sample
    for segments in workload.appends(writer):

        def insert(segments=segments) -> int:
            table.append_all(segments, timeout_s=30.0)
            return len(segments) * T

        yield insert


class _Bare:
    """A socket, and memory to receive into."""

    def __init__(self, url: str) -> None:
        endpoint = Endpoint(url)
        self._socket = endpoint.open_socket(30.0)
        self._memory = memoryview(bytearray(64))
        greeting = endpoint.greeting()
        self._socket.sendall(b"".join(pack(greeting)))
        self.receive(5 * len(greeting))

    def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        waiting = [memoryview(buffer) for buffer in buffers]
        while waiting:
            sent = self._socket.sendmsg(waiting[:512])
            while waiting and sent >= len(waiting[0]):
                sent -= len(waiting.pop(0))
            if sent:
                waiting[0] = waiting[0][sent:]

    def receive(self, num_bytes: int) -> None:
        if len(self._memory) < num_bytes:
            self._memory = memoryview(bytearray(num_bytes))
        filled = 0
        while filled < num_bytes:
            size = self._socket.recv_into(self._memory[filled:num_bytes])
            if not size:
                raise ConnectionError("the server closed the connection")
            filled += size


def raw_key(kind: str, episode: int, segment: int) -> str:
    return f"{{raw}}:{kind}:{episode:010d}000000:{segment}"


def _raw_work(task: Task, writer: str) -> Iterator[Work]:
    rows = _Bare(task.url)
    images = _Bare(task.images_url) if task.images_url else None
    return _raw_inserts(task, writer, rows, images) if task.action == "insert" else _raw_samples(task, rows, images)


def _raw_inserts(task: Task, writer: str, rows: _Bare, images: _Bare | None) -> Iterator[Work]:
    workload = task.workload
    codec = SegmentCodec(workload.spec, T)
    encoded = codec.encode_all(next(workload.appends(writer)))
    stored = max(1, task.stored_steps // (T * EPISODE_SEGMENTS))
    episode = 0
    while True:
        names = [(episode + i // EPISODE_SEGMENTS, i % EPISODE_SEGMENTS) for i in range(len(encoded))]
        episode = (episode + max(1, len(encoded) // EPISODE_SEGMENTS)) % stored
        row_request = pack(("SET", raw_key("row", *name), e.row) for name, e in zip(names, encoded, strict=True))
        image_request = pack(
            ("SET", raw_key("image", *name), data)
            for name, e in zip(names, encoded, strict=True)
            for data in e.images.values()
        )

        def insert(row_request=row_request, image_request=image_request) -> int:
            if images is not None:
                images.send(image_request)
            rows.send(row_request)
            if images is not None:
                images.receive(5 * len(encoded))
            rows.receive(5 * len(encoded))
            return len(encoded) * T

        yield insert


def _raw_samples(task: Task, rows: _Bare, images: _Bare | None) -> Iterator[Work]:
    workload = task.workload
    codec = SegmentCodec(workload.spec, T)
    frame_bytes = workload.camera_side**2 * 3
    rng = np.random.default_rng()
    stored = max(1, task.stored_steps // (T * EPISODE_SEGMENTS))
    while True:
        episodes = rng.integers(0, stored, workload.windows)
        pieces = WindowPieces.around(
            rng.integers(0, EPISODE_SEGMENTS, workload.windows),
            rng.integers(0, T, workload.windows),
            context_steps=K,
            num_steps=T,
        )
        names = list(zip(episodes[pieces.windows].tolist(), pieces.segments.tolist(), strict=True))
        row_request, row_bytes = _ranges("row", names, pieces, codec.steps_offset, codec.step_bytes)
        image_request, image_bytes = _ranges("image", names, pieces, 0, frame_bytes)

        def sample(row_request=row_request, row_bytes=row_bytes, image_request=image_request, image_bytes=image_bytes):
            if images is not None:
                images.send(image_request)
            rows.send(row_request)
            rows.receive(row_bytes)
            if images is not None:
                images.receive(image_bytes)
            return workload.windows * K

        yield sample


def _ranges(
    kind: str, names: list[tuple[int, int]], pieces: WindowPieces, offset: int, stride: int
) -> tuple[list[bytes | memoryview], int]:
    """Packed GETRANGE commands, and the bytes of their replies."""
    firsts = (offset + pieces.firsts * stride).tolist()
    sizes = (pieces.counts * stride).tolist()
    request = pack(
        ("GETRANGE", raw_key(kind, *name), first, first + size - 1)
        for name, first, size in zip(names, firsts, sizes, strict=True)
    )
    return request, sum(len(str(size)) + 3 + size + 2 for size in sizes)
