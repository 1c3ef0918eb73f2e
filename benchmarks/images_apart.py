"""What the log of an append-only server costs with images, and what is left of it with images on a server of their own.

Alternates the three ways and prints the median of each, so that a noisy machine hits all of them.

    python -m benchmarks.images_apart
"""

import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from vla_dist.core.specs import CameraSpec
from vla_dist.core.types import Segment
from vla_dist.replay.config import BufferConfig
from vla_dist.replay.server import EmbeddedServer
from vla_dist.replay.table import RedisReplayTable
from vla_dist.testing.fakes import make_segment, make_spec

T = 32
NUM_EPISODES = 60
ROUNDS = 5
SPEC = make_spec(
    proprio_dim=39, action_dim=4, cameras=(CameraSpec(name="front", height=84, width=84),), max_episode_steps=T
)


def main() -> None:
    segment = make_segment(SPEC, episode_id="e", num_steps=T, is_last=True)
    rates: dict[str, list[float]] = {"no log": [], "one server, logged": [], "images apart": []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(ROUNDS):
            for name in rates:
                rates[name].append(_rate(segment, Path(folder) / f"{turn}-{name}", name))
    best = statistics.median(rates["no log"])
    for name, values in rates.items():
        middle = statistics.median(values)
        sys.stdout.write(f"{name:20} {middle / 1e3:7.1f} k steps/s  {middle / best:5.2f} of no log\n")


def _rate(segment: Segment, folder: Path, name: str) -> float:
    """Steps appended a second."""
    with (
        EmbeddedServer(folder / "main", append_only=name != "no log") as server,
        EmbeddedServer(folder / "images", append_only=False) as images,
    ):
        table = RedisReplayTable(
            server.url, SPEC, BufferConfig(name="b"), images_url=images.url if name == "images apart" else None
        )
        segments = [replace(segment, episode_id=f"e{number}") for number in range(NUM_EPISODES)]
        start = time.perf_counter()
        for one in segments:
            table.append(one, timeout_s=30.0)
        taken = time.perf_counter() - start
        table.close()
    return NUM_EPISODES * T / taken


if __name__ == "__main__":
    main()
