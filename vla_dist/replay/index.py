"""A client's copy of which complete episodes a buffer holds, and of what a draw needs to know about them.

Draws are made on this copy with NumPy, so they cost the server nothing and the same whether it holds 1e4 steps or 1e7.
"""

import itertools
import struct
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from vla_dist.core.types import SOURCES, Array, Source

# See LIVE and SEGMENT in functions.lua.
_LIVE = struct.Struct("<ddIIBBBBd16sHHH")
_EPISODE = {
    "completion": "<i8",
    "digest": "S16",
    "first_row": "<i8",  # Position among the rows.
    "num_segments": "<i4",
    "length": "<i4",
    "source": "u1",
    "success": "u1",
    "intervened": "u1",
    "task": "<i4",
    "instruction": "<i4",
    "completed_at_s": "<f8",
}
_ROW = {
    "number": "<i8",  # Identity of the segment for ever.
    "episode": "<i4",  # Position among the episodes.
    "segment": "<i4",
    "length": "<i4",  # 0: gone, or not to be drawn any more.
    "policy_version": "<i8",
    "tail_return": "<f8",  # Reward that the episode still collects after this segment.
    "steps_before": "<i8",  # Steps of complete episodes that came before this segment, ever.
}
_LEAST_COMPACTION = 1024


class Texts:
    """Strings by number."""

    def __init__(self) -> None:
        self.by_number: list[str] = []
        self._numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        if text not in self._numbers:
            self._numbers[text] = len(self.by_number)
            self.by_number.append(text)
        return self._numbers[text]


class Columns:
    """N records that grow at their end.

    What belongs to one record lies side by side: a draw meets records at random, and each line of memory that the
    processor's caches lack costs as much as all other work on it.
    """

    def __init__(self, dtypes: Mapping[str, str], *, ascending: Sequence[str]) -> None:
        """``ascending``: columns that are searched, so they are kept in one piece as well."""
        self._records = np.zeros(64, np.dtype(list(dtypes.items()), align=True))
        self._ascending = {name: np.zeros(64, dtypes[name]) for name in ascending}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, name: str) -> Array:
        """(N,) one column."""
        column = self._ascending[name] if name in self._ascending else self._records[name]
        return column[: self._size]

    def take(self, positions: Array) -> Array:
        """Structured (n,) copy of the records there."""
        # Indexing would copy field by field.
        return self._records.take(positions)

    def extend(self, num: int, **columns: Any) -> slice:
        """``num`` more, of whose every column the values are given; returns where they are."""
        first, self._size = self._size, self._size + num
        if self._size > len(self._records):
            self._records = _longer(self._records, first, 2 * self._size)
            self._ascending = {name: _longer(old, first, 2 * self._size) for name, old in self._ascending.items()}
        for name, values in columns.items():
            self._records[name][first : self._size] = values
        for name, column in self._ascending.items():
            column[first : self._size] = columns[name]
        return slice(first, self._size)

    def keep(self, kept: Array) -> None:
        """Drop all but those where ``kept`` (N,) is true."""
        positions = np.flatnonzero(kept)
        self._ascending = {name: self[name].take(positions) for name in self._ascending}
        self._records = self.take(positions)
        self._size = len(positions)


class EpisodeIndex:
    """Rows (segments) of complete episodes in the order they became whole. Not safe for several threads."""

    def __init__(self, num_steps: int) -> None:
        """``num_steps`` is T."""
        self.num_steps = num_steps
        self.tasks = Texts()
        self.instructions = Texts()
        self.generation = 0
        """Grows whenever the positions of rows change."""
        self.clear()

    def clear(self) -> None:
        """Start again from nothing."""
        self.episodes = Columns(_EPISODE, ascending=("completion",))
        """Those that left included, until the next compaction."""
        self.rows = Columns(_ROW, ascending=("number", "steps_before"))
        self.live_steps = 0
        """Steps that may be drawn."""
        self._live_rows = 0
        self._steps_ever = 0
        self.emptied: list[Array] = []
        """Positions of rows that left or were used up since ``generation`` last grew."""
        self.generation += 1

    def add(self, entries: Sequence[bytes]) -> None:
        """Packed entries of the stream of complete episodes, in its order."""
        for packed in entries:
            completion, row, length, num, source, success, intervened, _, at_s, digest, *sizes = _LIVE.unpack_from(
                packed
            )
            start = _LIVE.size + sizes[0]
            task = packed[start : start + sizes[1]].decode()
            instruction = packed[start + sizes[1] : start + sizes[1] + sizes[2]].decode()
            segments = np.frombuffer(packed, "<f8", 2 * num, start + sizes[1] + sizes[2]).reshape(num, 2)
            episode = self.episodes.extend(
                1,
                completion=int(completion),
                digest=digest,
                first_row=len(self.rows),
                num_segments=num,
                length=length,
                source=source,
                success=success,
                intervened=intervened,
                task=self.tasks.number(task),
                instruction=self.instructions.number(instruction),
                completed_at_s=at_s,
            ).start
            numbers = np.arange(num)
            self.rows.extend(
                num,
                number=int(row) + numbers,
                episode=episode,
                segment=numbers,
                length=np.minimum(self.num_steps, length - numbers * self.num_steps),
                policy_version=segments[:, 1],
                tail_return=np.cumsum(segments[::-1, 0])[::-1] - segments[:, 0],
                steps_before=self._steps_ever + numbers * self.num_steps,
            )
            self._steps_ever += length
            self.live_steps += length
            self._live_rows += num

    def remove(self, completions: Array) -> None:
        """Episodes that left; unknown ones left before they were seen."""
        at = _positions(self.episodes["completion"], completions)
        firsts, nums = self.episodes["first_row"][at], self.episodes["num_segments"][at]
        for first, num in zip(firsts.tolist(), nums.tolist(), strict=True):
            self._empty(np.arange(first, first + num))
        self._compact()

    def use_up(self, numbers: Array) -> None:
        """Rows, by their numbers, that may not be drawn any more."""
        self._empty(self.find(numbers))
        self._compact()

    def find(self, numbers: Array) -> Array:
        """Positions of the rows with these numbers; rows that left are left out."""
        return _positions(self.rows["number"], numbers)

    def source(self, episode: int) -> Source:
        return SOURCES[int(self.episodes["source"][episode])]

    def _empty(self, positions: Array) -> None:
        lengths = self.rows["length"]
        self.live_steps -= int(lengths[positions].sum())
        self._live_rows -= int((lengths[positions] > 0).sum())
        lengths[positions] = 0
        self.emptied.append(positions)

    def _compact(self) -> None:
        """Drop what left once it is more than half, so that draws seldom meet it and memory stays bounded."""
        rows, episodes = self.rows, self.episodes
        if len(rows) < max(_LEAST_COMPACTION, 2 * self._live_rows):
            return
        # An episode keeps all its rows while one of them may be drawn: windows find earlier segments by position.
        kept = np.zeros(len(episodes), bool)
        kept[rows["episode"][rows["length"] > 0]] = True
        rows.keep(kept[rows["episode"]])
        rows["episode"][:] = (np.cumsum(kept) - 1)[rows["episode"]]
        episodes.keep(kept)
        episodes["first_row"][:] = np.cumsum(episodes["num_segments"]) - episodes["num_segments"]
        # Rows used up within kept episodes count as live here, so that compaction does not start again at once.
        self._live_rows = len(rows)
        self.emptied = []
        self.generation += 1


def _longer(old: Array, num: int, size: int) -> Array:
    new = np.zeros(size, old.dtype)
    new[:num] = old[:num]
    return new


def _positions(ascending: Array, wanted: Array) -> Array:
    """Where the values ``wanted`` stand in an ascending array; those that do not are left out."""
    at = np.searchsorted(ascending, wanted)
    inside = at < len(ascending)
    at, wanted = at[inside], np.asarray(wanted)[inside]
    return cast(Array, at[ascending[at] == wanted])


def decode_entry(packed: bytes) -> dict[str, Any]:
    """One entry of the stream of complete episodes, for those who read it without an index.

    Returns:
        ``completion``, ``length``, ``num_segments``, ``source``, ``success``, ``intervened``, ``completed_at_s``,
        ``digest`` (text), ``episode_id``, ``task``, ``instruction``, and for each segment ``returns`` and
        ``policy_versions``.
    """
    completion, _, length, num, source, success, intervened, _, at_s, digest, *sizes = _LIVE.unpack_from(packed)
    bounds = np.cumsum([_LIVE.size, *sizes]).tolist()
    episode_id, task, instruction = (packed[a:b].decode() for a, b in itertools.pairwise(bounds))
    segments = np.frombuffer(packed, "<f8", 2 * num, bounds[-1]).reshape(num, 2)
    return {
        "completion": int(completion),
        "length": length,
        "num_segments": num,
        "source": SOURCES[source],
        "success": bool(success),
        "intervened": bool(intervened),
        "completed_at_s": at_s,
        "digest": digest.decode(),
        "episode_id": episode_id,
        "task": task,
        "instruction": instruction,
        "returns": segments[:, 0].copy(),
        "policy_versions": segments[:, 1].astype(np.int64),
    }
