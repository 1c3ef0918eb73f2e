"""Segments on their way into a buffer, and how the commit is told of them.

consumes: segments. emits: batches of arrivals.
"""

import itertools
import struct
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from vla_dist.core.errors import DataError
from vla_dist.core.protocols import AppendResult
from vla_dist.core.types import SOURCES, Segment
from vla_dist.data.segment_codec import EncodedSegment, SegmentCodec
from vla_dist.replay.keys import episode_digest

_MOST_SEGMENTS = 64
_MOST_BYTES = 20 << 20
"""In one batch: an exchange costs the server as much as two or three segments."""
MOST_SEGMENTS_PER_EPISODE = 1 << 16
# See functions.lua.
_RUN = struct.Struct("<16sBHHHH")
_ARRIVAL = struct.Struct("<IIBBBdd")


@dataclass(slots=True)
class Arrival:
    """One segment that is to be stored."""

    segment: Segment
    encoded: EncodedSegment
    digest: str
    packed: bytes
    """What the commit must know of it."""
    result: AppendResult | None = None
    inserted: bool = False
    """By this call, even if its images had to be brought again."""


@dataclass(slots=True)
class ArrivalBatch:
    """Some that are sent together."""

    arrivals: list[Arrival]
    asks: bool = False
    """Whether to find out first if they must wait: their rows are not sent before they need not."""
    staged: bool | None = False
    """Whether their images lie on a server, under an expiry; None: they are on their way."""
    wait_reason: str = ""
    """Why they are not stored yet."""
    refused: DataError | None = None
    """The first that contradicts its episode."""
    stopped: bool = False
    """Whether the last commit of them ended early, so that what comes after them must not be stored first."""

    def keep_unstored(self) -> None:
        """The others are done with."""
        self.arrivals = [arrival for arrival in self.arrivals if arrival.result is None]

    def packed(self, *, with_rows: bool) -> Iterator[bytes | memoryview]:
        """For the commit: what neighbours of one episode have in common is said once, then come their rows, if any."""
        for (digest, source, task, instruction), run in itertools.groupby(self.arrivals, _in_common):
            arrivals = list(run)
            texts = (arrivals[0].segment.episode_id.encode(), task.encode(), instruction.encode())
            head = _RUN.pack(digest.encode(), SOURCES.index(source), len(arrivals), *map(len, texts))
            yield b"".join((head, *texts, *(arrival.packed for arrival in arrivals)))
            if with_rows:
                yield from (b"" if self.asks else arrival.encoded.row for arrival in arrivals)


def arrival_batches(
    codec: SegmentCodec, segments: Sequence[Segment], frames: Sequence[Mapping[str, bytes | memoryview]] | None
) -> Iterator[ArrivalBatch]:
    """All are checked at once, and encoded when their batch is asked for.

    Raises:
        DataError: one of them does not fit.
    """
    for segment in segments:
        if segment.segment_index >= MOST_SEGMENTS_PER_EPISODE:
            raise DataError(
                f"segment_index {segment.segment_index} must be below {MOST_SEGMENTS_PER_EPISODE}; end the episode "
                "earlier"
            )
    checked = codec.check(segments, frames)
    most = max(1, min(_MOST_SEGMENTS, _MOST_BYTES // codec.largest_bytes))
    return (
        ArrivalBatch(
            [
                Arrival(segment, encoded, episode_digest(segment.episode_id), _packed(segment, encoded))
                for segment, encoded in zip(segments[start:stop], checked.encode(start, stop), strict=True)
            ]
        )
        for start, stop in _cuts(len(segments), most)
    )


def _cuts(num_segments: int, most: int) -> Iterator[tuple[int, int]]:
    """Where batches begin and end: the first is half of the largest, so that the server soon has something to do, and
    none is smaller, because batches of a few cost both sides more by the segment.
    """
    least = size = max(1, most // 2)
    start = 0
    while start < num_segments:
        stop = start + size
        if num_segments - stop < least:
            stop = num_segments
        yield start, stop
        start, size = stop, min(2 * size, most)


def encoded_ahead(batches: Iterator[ArrivalBatch]) -> Generator[ArrivalBatch, None, None]:
    """The same, each encoded by another thread while the one before it is on its way: for frames that takes long.

    Where the consumer ends early, the one that was being encoded is not given out, but ``batches`` has passed it.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="encode-frames") as thread:
        waiting = thread.submit(next, batches, None)
        try:
            while (batch := waiting.result()) is not None:
                waiting = thread.submit(next, batches, None)
                yield batch
        finally:
            # What went wrong there must not be lost with it.
            waiting.result()


def _packed(segment: Segment, encoded: EncodedSegment) -> bytes:
    return _ARRIVAL.pack(
        segment.segment_index,
        segment.length,
        segment.is_last,
        segment.is_last and segment.success,
        encoded.intervened,
        segment.policy_version,
        encoded.segment_return,
    )


def _in_common(arrival: Arrival) -> tuple[str, str, str, str]:
    segment = arrival.segment
    return arrival.digest, segment.source, segment.task, segment.instruction
