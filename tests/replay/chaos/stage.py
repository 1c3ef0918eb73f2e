"""What a storm and the programs in it share: the buffer, the folder of journals, and how a program ends."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from chaos.ground_truth import IMAGE_ENCODINGS, SPEC

from vla_dist.replay.config import BufferConfig, Fifo, Prioritised, TableConfig
from vla_dist.replay.limiter import LimiterConfig
from vla_dist.replay.table import RedisReplayTable

T, K = 4, 6
PATIENCE_S = 60.0
"""More than any outage of a storm: who has to give up found a bug."""
CACHE_BYTES = (0, 4096, 1 << 24)
"""What readers keep of rows that they fetched: none, a few, all."""
TABLES = (
    TableConfig(name="uniform", limiter=LimiterConfig(samples_per_insert=1.0, error_buffer_steps=400)),
    TableConfig(name="scored", sampler=Prioritised()),
    TableConfig(name="queue", sampler=Fifo(), limiter=LimiterConfig(samples_per_insert=1.0, error_buffer_steps=2000)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Of one storm; lies in its folder as JSON."""

    url: str
    capacity_steps: int
    seed: int

    @classmethod
    def read(cls, folder: Path) -> "Stage":
        return cls(**json.loads((folder / "stage.json").read_text()))

    def write(self, folder: Path) -> None:
        (folder / "stage.json").write_text(json.dumps(asdict(self)))

    def connect(self, table: str, *, seed: int = 0, cache_bytes: int | None = None) -> RedisReplayTable:
        config = BufferConfig(
            name="storm",
            num_steps=T,
            context_steps=K,
            capacity_steps=self.capacity_steps,
            cache_bytes=CACHE_BYTES[seed % len(CACHE_BYTES)] if cache_bytes is None else cache_bytes,
            image_encodings=IMAGE_ENCODINGS,
            tables=TABLES,
        )
        return RedisReplayTable(self.url, SPEC, config, table=table, seed=seed)


class Journal:
    """Lines of whole numbers that survive the death of their writer."""

    def __init__(self, path: Path) -> None:
        if path.exists():
            # What a death cut off must not run into the next line.
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        self._file = path.open("ab", buffering=0)

    def note(self, lines: list[tuple[int, ...]]) -> None:
        self._file.write(b"".join(" ".join(map(str, line)).encode() + b"\n" for line in lines))
        os.fsync(self._file.fileno())

    @staticmethod
    def read(path: Path) -> list[tuple[int, ...]]:
        if not path.exists():
            return []
        whole, _, _ = path.read_bytes().rpartition(b"\n")
        return [tuple(map(int, line.split())) for line in whole.splitlines()]
