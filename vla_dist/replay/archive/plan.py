"""What the next file of an archive is to hold."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from vla_dist.replay.episodes import Entry
from vla_dist.replay.table import RedisReplayTable

_PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchivePlan:
    """As it is stored in Redis before anything is written."""

    file: str
    """Empty where there is nothing to write."""
    completions: tuple[int, ...]
    """Numbers of its episodes."""
    duplicates: int
    """Episodes that the archive holds already."""
    reached: int
    """Completions up to this one are dealt with when the plan is finished."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes) -> "ArchivePlan":
        fields = json.loads(text)
        return cls(**{**fields, "completions": tuple(fields["completions"])})


class PartSize:
    """Says how many of the waiting episodes fill a file."""

    def __init__(self, table: RedisReplayTable, *, max_episodes: int, max_bytes: int) -> None:
        """The episode that reaches ``max_bytes`` is the last one of a file."""
        self._table = table
        self.max_episodes = max_episodes
        self._max_bytes = max_bytes
        self._segment_bytes: dict[str, int] = {}

    def fill(self, waiting: Sequence[Entry]) -> tuple[list[Entry], bool]:
        """As many of the first as one file takes, and whether it is full then. Raises Unreachable."""
        self._measure(waiting)
        chosen, num_bytes = [], 0
        for entry in waiting[: self.max_episodes]:
            chosen.append(entry)
            num_bytes += entry["num_segments"] * self._segment_bytes[entry["digest"]]
            if num_bytes >= self._max_bytes:
                return chosen, True
        return chosen, len(chosen) == self.max_episodes

    def _measure(self, waiting: Sequence[Entry]) -> None:
        """Bytes of a segment of each episode, judged by its first one."""
        keys, cameras = self._table.keys, range(len(self._table.codec.image_codecs))
        known = self._segment_bytes
        new = [entry["digest"] for entry in waiting if entry["digest"] not in known]
        commands = [("STRLEN", keys.image(digest, 0, camera)) for digest in new for camera in cameras]
        sizes = self._table.images_link.call(commands, timeout_s=_PATIENCE_S) if commands else []
        images = np.array(sizes, np.int64).reshape(len(new), len(cameras)).sum(axis=1).tolist()
        measured = {digest: self._table.codec.row_bytes + size for digest, size in zip(new, images, strict=True)}
        self._segment_bytes = {entry["digest"]: (known | measured)[entry["digest"]] for entry in waiting}
