"""The replay table against a bare socket that moves the same bytes through the same server, in one run.

    vla-dist bench replay [--steps 10000 100000] [--seconds 2] [--windows 64] [--camera 84] [--json FILE]

Inserts are segments of T = 32 steps, one append at a time; samples are batches of K = 20 step windows. The limit side
does one SET, and one MGET of as many rows as such a batch touches (plus the frames of its windows), without looking at
an answer but for its size. Both sides take turns in short slices, so that a busy machine slows both.

An insert rate counts environment steps; a sample rate counts window steps, B x K for each batch. One client, which
waits for each answer: what one writer and one reader see.
"""

import argparse
import json
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlparse

import numpy as np

from vla_dist.core.specs import CameraSpec
from vla_dist.core.types import Segment
from vla_dist.data.segment_codec import SegmentCodec
from vla_dist.replay.config import TableConfig
from vla_dist.replay.server import EmbeddedServer
from vla_dist.replay.table import RedisReplayTable
from vla_dist.testing.fakes import make_segment, make_spec

NUM_STEPS, CONTEXT_STEPS, SEGMENTS_PER_EPISODE = 32, 20, 5
SLICE_S = 0.25


class BareSocket:
    """The least a client can do: commands packed by hand, answers counted and thrown away."""

    def __init__(self, url: str) -> None:
        parts = urlparse(url)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(unquote(parts.path))
        self._sink = memoryview(bytearray(1 << 20))
        self.exchange(self.pack("AUTH", parts.username or "", parts.password or ""), len(b"+OK\r\n"))

    @staticmethod
    def pack(*words: str | bytes) -> bytes:
        parts = [word.encode() if isinstance(word, str) else word for word in words]
        return b"".join([b"*%d\r\n" % len(parts), *(b"$%d\r\n%b\r\n" % (len(p), p) for p in parts)])

    @staticmethod
    def bulk_size(size: int) -> int:
        return len(b"$%d\r\n" % size) + size + 2

    def exchange(self, request: bytes, answer_bytes: int) -> None:
        self._socket.sendall(request)
        while answer_bytes > 0:
            received = self._socket.recv_into(self._sink)
            if not received:
                raise ConnectionError("the server closed the connection")
            answer_bytes -= received

    def close(self) -> None:
        self._socket.close()


class Episodes:
    """An endless stream of segments that differ only in their identity, made ahead of the clock."""

    def __init__(self, template: list[Segment]) -> None:
        self._template = template
        self._next = 0

    def take(self) -> Segment:
        episode, index = divmod(self._next, len(self._template))
        self._next += 1
        return replace(self._template[index], episode_id=f"bench-{episode}")


def rate(action: Callable[[], None], seconds: float) -> float:
    """Calls per second."""
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        action()
        count += 1
    return count / (time.perf_counter() - started)


def in_turns(actions: dict[str, Callable[[], None]], seconds: float) -> dict[str, float]:
    """Median calls per second of each, measured in alternating slices."""
    found: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(max(1, round(seconds / SLICE_S))):
        for name, action in actions.items():
            found[name].append(rate(action, SLICE_S))
    return {name: statistics.median(values) for name, values in found.items()}


def measure(url: str, *, stored_steps: int, num_windows: int, camera_size: int, seconds: float) -> dict[str, float]:
    cameras = (CameraSpec(name="front", height=camera_size, width=camera_size),) if camera_size else ()
    spec = make_spec(proprio_dim=39, action_dim=4, max_episode_steps=500, cameras=cameras)
    config = TableConfig(
        name=f"bench-{stored_steps}", num_steps=NUM_STEPS, context_steps=CONTEXT_STEPS, capacity_steps=stored_steps
    )
    table = RedisReplayTable(url, spec, config, seed=0)
    stream = Episodes(
        [
            make_segment(
                spec, episode_id="x", segment_index=i, num_steps=NUM_STEPS, is_last=i == SEGMENTS_PER_EPISODE - 1
            )
            for i in range(SEGMENTS_PER_EPISODE)
        ]
    )
    # Full to the brim first: from here on each insert pays for its share of evictions.
    for _ in range(stored_steps // NUM_STEPS + SEGMENTS_PER_EPISODE):
        table.append(stream.take(), timeout_s=30)

    codec = SegmentCodec(spec, NUM_STEPS)
    encoded = codec.encode(stream.take())
    bare = BareSocket(url)
    rows_touched = round(num_windows * (1 + (CONTEXT_STEPS - 1) / NUM_STEPS * (1 - 1 / SEGMENTS_PER_EPISODE)))
    keys = [f"bare:row:{i}" for i in range(min(rows_touched, stored_steps // NUM_STEPS))]
    for key in keys:
        bare.exchange(bare.pack("SET", key, encoded.row), len(b"+OK\r\n"))
    payloads = [encoded.row, *encoded.images.values()]
    set_all = b"".join(bare.pack("SET", f"bare:write:{i}", data) for i, data in enumerate(payloads))
    get_all = bare.pack("MGET", *keys)
    get_bytes = len(b"*%d\r\n" % len(keys)) + len(keys) * bare.bulk_size(codec.row_bytes)
    if camera_size:
        frames = CONTEXT_STEPS * codec.frame_bytes["front"]
        get_all += bare.pack("GETRANGE", "bare:write:1", "0", str(frames - 1)) * num_windows
        get_bytes += num_windows * bare.bulk_size(frames)

    def append() -> None:
        table.append(stream.take(), timeout_s=30)

    def sample() -> None:
        table.sample(num_windows, timeout_s=30)

    inserts = in_turns(
        {"table": append, "bare": lambda: bare.exchange(set_all, len(payloads) * len(b"+OK\r\n"))}, seconds
    )
    samples = in_turns({"table": sample, "bare": lambda: bare.exchange(get_all, get_bytes)}, seconds)
    latencies = []
    for _ in range(100):
        started = time.perf_counter()
        sample()
        latencies.append(time.perf_counter() - started)
    table.close()
    bare.close()
    window_steps = num_windows * CONTEXT_STEPS
    return {
        "insert_steps_per_s": inserts["table"] * NUM_STEPS,
        "insert_limit_steps_per_s": inserts["bare"] * NUM_STEPS,
        "insert_share_of_limit": inserts["table"] / inserts["bare"],
        "sample_steps_per_s": samples["table"] * window_steps,
        "sample_limit_steps_per_s": samples["bare"] * window_steps,
        "sample_share_of_limit": samples["table"] / samples["bare"],
        "sample_p50_ms": float(np.percentile(latencies, 50)) * 1000,
        "sample_p99_ms": float(np.percentile(latencies, 99)) * 1000,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[10_000, 100_000], help="stored steps, one table each")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each side of each measurement")
    parser.add_argument("--windows", type=int, default=64, help="B, windows of a batch")
    parser.add_argument("--camera", type=int, default=0, help="side of one square camera in pixels; 0: no camera")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    answer: dict[str, dict[str, float]] = {}
    for steps in options.steps:
        # A server for each size: the one before must not hold memory or fork for its log meanwhile.
        with tempfile.TemporaryDirectory() as folder, EmbeddedServer(Path(folder) / "redis") as server:
            found = measure(
                server.url,
                stored_steps=steps,
                num_windows=options.windows,
                camera_size=options.camera,
                seconds=options.seconds,
            )
        answer[str(steps)] = found
        print(
            f"{steps:>9} steps stored: insert {found['insert_steps_per_s'] / 1000:7.1f} k steps/s "
            f"({found['insert_share_of_limit']:.0%} of a bare socket), sample "
            f"{found['sample_steps_per_s'] / 1000:7.1f} k steps/s ({found['sample_share_of_limit']:.0%}), "
            f"p50 {found['sample_p50_ms']:.2f} ms, p99 {found['sample_p99_ms']:.2f} ms",
            file=sys.stderr,
        )
    print(json.dumps(answer, indent=2))
    if options.json:
        options.json.write_text(json.dumps(answer, indent=2))


if __name__ == "__main__":
    main()
