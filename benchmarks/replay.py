"""The replay table beside the limits it cannot pass, in one run: inserting and sampling in steps a second.

    vla-dist bench replay [--seconds 10] [--json FILE]

- ``table``: RedisReplayTable on an embedded server over its Unix socket, one process.
- ``raw_protocol``: a second such server given the same bytes by plain redis-py pipelines: one SET of each payload, one
  MGET and the GETRANGEs of a batch; no codec, no dedupe, no limiter, no windows.
- ``numpy_ring``: arrays in this process, the upper bound of any replay.

Segments of T = 32 steps, windows of K = 20: low-dim alone (39 proprio, 4 action), and with an 84x84x3 frame a step. An
insert is acknowledged before the next one; a sample counts B x K steps. The systems take turns, so that all meet the
same noise; the medians over the turns are compared. Both servers log every write, as in a run. About 300 MB of memory.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import redis

from vla_dist.core.specs import CameraSpec, Dimension, EnvSpec
from vla_dist.core.types import Segment
from vla_dist.data.segment_codec import SegmentCodec
from vla_dist.replay.config import TableConfig
from vla_dist.replay.server import EmbeddedServer
from vla_dist.replay.table import RedisReplayTable
from vla_dist.testing.fakes import make_segment

T, K = 32, 20
EPISODE_SEGMENTS = 4
ROUNDS = 4
SYSTEMS = ("table", "raw_protocol", "numpy_ring")
COLUMNS = ("proprio", "actions", "target_actions", "rewards", "interventions")
Work = Callable[[], int]
"""Does one insert or one sample and returns its steps."""


def tabletop(cameras: tuple[CameraSpec, ...] = ()) -> EnvSpec:
    return EnvSpec(
        name="bench",
        proprio=tuple(Dimension(name=f"p{i}") for i in range(39)),
        action=tuple(Dimension(name=f"a{i}", low=-1.0, high=1.0) for i in range(4)),
        control_hz=10.0,
        max_episode_steps=EPISODE_SEGMENTS * T,
        cameras=cameras,
    )


def endless_segments(spec: EnvSpec) -> Iterator[Segment]:
    """Complete episodes of four segments, for ever, from one episode of noise."""
    noise = [
        make_segment(spec, episode_id="x", segment_index=i, num_steps=T, is_last=i == EPISODE_SEGMENTS - 1)
        for i in range(EPISODE_SEGMENTS)
    ]
    for episode in itertools.count():
        for segment in noise:
            yield replace(segment, episode_id=f"episode-{episode}")


def table_system(spec: EnvSpec, url: str, num_segments: int, batch: int) -> tuple[Work, Work]:
    table = RedisReplayTable(
        url, spec, TableConfig(name="bench", num_steps=T, context_steps=K, capacity_steps=num_segments * T)
    )
    segments = endless_segments(spec)

    def insert() -> int:
        table.append(next(segments), timeout_s=10.0)
        return T

    def sample() -> int:
        return table.sample(batch, timeout_s=10.0).timesteps.size

    return insert, sample


def raw_system(spec: EnvSpec, url: str, num_segments: int, batch: int) -> tuple[Work, Work]:
    client = redis.Redis.from_url(url, protocol=2, socket_read_size=1 << 20)
    codec = SegmentCodec(spec, T)
    encoded = [codec.encode(segment) for segment in itertools.islice(endless_segments(spec), EPISODE_SEGMENTS)]
    slots = itertools.count()
    rng = np.random.default_rng(0)

    def insert() -> int:
        number = next(slots)
        slot, payload = number % num_segments, encoded[number % EPISODE_SEGMENTS]
        with client.pipeline(transaction=False) as pipe:
            pipe.set(f"row:{slot}", payload.row)
            for name, frames in payload.images.items():
                pipe.set(f"image:{name}:{slot}", frames)
            pipe.execute()
        return T

    def sample() -> int:
        # The windows of the table: most begin in the segment before the one they end in, if there is one.
        ends = rng.integers(num_segments * T, size=batch)
        firsts = np.maximum(ends - K + 1, ends - ends % (EPISODE_SEGMENTS * T))
        with client.pipeline(transaction=False) as pipe:
            pipe.mget([f"row:{slot}" for slot in np.union1d(ends // T, firsts // T)])
            for name, size in codec.frame_bytes.items():
                for first, end in zip(firsts.tolist(), ends.tolist(), strict=True):
                    for slot in range(first // T, end // T + 1):
                        low, high = max(first - slot * T, 0), min(end - slot * T, T - 1)
                        pipe.getrange(f"image:{name}:{slot}", low * size, (high + 1) * size - 1)
            replies = pipe.execute()
        assert None not in replies[0]
        return batch * K

    return insert, sample


def ring_system(spec: EnvSpec, num_segments: int, batch: int) -> tuple[Work, Work]:
    episode = list(itertools.islice(endless_segments(spec), EPISODE_SEGMENTS))
    ring = {
        name: np.zeros((num_segments * T, *getattr(episode[0], name).shape[1:]), getattr(episode[0], name).dtype)
        for name in COLUMNS
    }
    ring |= {c.name: np.zeros((num_segments * T, c.height, c.width, 3), np.uint8) for c in spec.cameras}
    slots = itertools.count()
    rng = np.random.default_rng(0)

    def insert() -> int:
        number = next(slots)
        segment, at = episode[number % EPISODE_SEGMENTS], number % num_segments * T
        for name, column in ring.items():
            column[at : at + T] = segment.images[name] if name in segment.images else getattr(segment, name)
        return T

    def sample() -> int:
        ends = rng.integers(K - 1, num_segments * T, size=batch)
        steps = ends[:, None] + np.arange(1 - K, 1)
        gathered = {name: column[steps] for name, column in ring.items()}
        return gathered["rewards"].size

    return insert, sample


def steps_per_s(work: Work, seconds: float) -> float:
    work()
    steps, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        steps += work()
    return steps / elapsed


def compare(spec: EnvSpec, *, num_segments: int, batch: int, seconds: float) -> dict[str, dict[str, float]]:
    """Medians over the rounds, each of which gives every system its turn."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        urls = [stack.enter_context(EmbeddedServer(folder / name, max_memory_bytes=2**28)).url for name in SYSTEMS[:2]]
        systems = {
            "table": table_system(spec, urls[0], num_segments, batch),
            "raw_protocol": raw_system(spec, urls[1], num_segments, batch),
            "numpy_ring": ring_system(spec, num_segments, batch),
        }
        for insert, _ in systems.values():
            for _ in range(num_segments):
                insert()
        found: dict[str, dict[str, list[float]]] = {"insert": {}, "sample": {}}
        for _ in range(ROUNDS):
            for number, verb in enumerate(found):
                for name, works in systems.items():
                    found[verb].setdefault(name, []).append(steps_per_s(works[number], seconds))
    medians = {verb: {name: statistics.median(rates) for name, rates in row.items()} for verb, row in found.items()}
    return {
        "insert_steps_per_s": medians["insert"],
        "sample_steps_per_s": medians["sample"],
        "ratio_vs_raw": {verb: row["table"] / row["raw_protocol"] for verb, row in medians.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="of measuring, in all")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.seconds <= 0:
        parser.error(f"--seconds {options.seconds} must be positive")
    turn_s = options.seconds / (2 * ROUNDS * 2 * len(SYSTEMS))
    shapes = {
        "low_dim": (tabletop(), 2048, 256),
        "image": (tabletop((CameraSpec(name="front", height=84, width=84),)), 80, 32),
    }
    answer = {}
    for shape, (spec, num_segments, batch) in shapes.items():
        answer[shape] = compare(spec, num_segments=num_segments, batch=batch, seconds=turn_s)
        for verb in ("insert", "sample"):
            rates = answer[shape][f"{verb}_steps_per_s"]
            print(
                f"{shape:>7} {verb}: "
                + ", ".join(f"{name} {rate / 1000:.0f}" for name, rate in rates.items())
                + f" thousand steps/s; table / raw_protocol {answer[shape]['ratio_vs_raw'][verb]:.2f}",
                file=sys.stderr,
            )
    print(json.dumps(answer, indent=2))
    if options.json:
        options.json.write_text(json.dumps(answer, indent=2))


if __name__ == "__main__":
    main()
