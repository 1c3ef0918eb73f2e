"""Reading whole episodes back: for statistics, the archive, checks and on-policy learners."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vla_dist.core.errors import IntegrityError
from vla_dist.core.types import Segment
from vla_dist.data.segment_codec import SegmentCodec
from vla_dist.replay.index import decode_entry
from vla_dist.replay.keys import Keys
from vla_dist.replay.link import RedisLink
from vla_dist.replay.wire import Command

_PAGE = 64

Entry = Mapping[str, Any]
"""See ``index.decode_entry``."""


class PayloadMissing(IntegrityError):
    """An episode that is stored, but not whole."""


class EpisodeReader:
    """Complete episodes of one buffer; threads may share it."""

    def __init__(self, link: RedisLink, images: RedisLink, codec: SegmentCodec, keys: Keys) -> None:
        """``link`` leads to the rows, ``images`` to the frames; they may be the same."""
        self._link = link
        self._images = images
        self._codec = codec
        self._keys = keys

    def entries(self, *, after: int = 0, timeout_s: float) -> Iterator[Entry]:
        """What the buffer knows of each complete episode, in the order they became whole; each page is as of then.

        Args:
            after: completion after which to begin.
            timeout_s: for each page.
        """
        while True:
            command: Command = ("XRANGE", self._keys.live, f"({after}-0", "+", "COUNT", _PAGE)
            (page,) = self._link.call([command], timeout_s=timeout_s)
            for _, (_, packed) in page:
                entry = decode_entry(packed)
                after = entry["completion"]
                yield entry
            if len(page) < _PAGE:
                return

    def read(self, entry: Entry, *, timeout_s: float) -> list[Segment]:
        """The segments of one episode, checked against their checksums; empty where it was evicted meanwhile.

        Raises:
            PayloadMissing: the episode is there, but not all of its payload.
            IntegrityError: a damaged or strange segment, named.
        """
        payload = self.payload(entry, timeout_s=timeout_s)
        segments = []
        for index, (row, frames) in enumerate(payload):
            try:
                segment = self._codec.decode(row, frames)
            except IntegrityError as error:
                raise IntegrityError(f"episode {entry['episode_id']!r}, segment {index}: {error}") from error
            if (segment.episode_id, segment.segment_index) != (entry["episode_id"], index):
                raise IntegrityError(
                    f"episode {entry['episode_id']!r}, segment {index} holds segment "
                    f"{segment.episode_id!r}/{segment.segment_index}; discard the episode, and append it under another "
                    "id"
                )
            segments.append(segment)
        return segments

    def payload(self, entry: Entry, *, timeout_s: float) -> list[tuple[bytes, dict[str, bytes]]]:
        """Row and images, as stored, of each segment; empty where the episode was evicted meanwhile.

        Raises:
            PayloadMissing: the episode is there, but not all of its payload.
        """
        digest, indices = entry["digest"], range(entry["num_segments"])
        (rows,) = self._link.call([("MGET", *(self._keys.row(digest, i) for i in indices))], timeout_s=timeout_s)
        columns: dict[str, Sequence[bytes]] = {}
        for camera, name in enumerate(self._codec.image_codecs):
            # One at a time: an episode of raw images may be larger than a reply should be.
            names = [self._keys.image(digest, i, camera) for i in indices]
            columns[name] = self._images.call([("GET", image) for image in names], timeout_s=timeout_s)
        missing = [i for i in indices if rows[i] is None or any(column[i] is None for column in columns.values())]
        if not missing:
            return [(rows[i], {name: column[i] for name, column in columns.items()}) for i in indices]
        completion = f"{entry['completion']}-0"
        (still_there,) = self._link.call([("XRANGE", self._keys.live, completion, completion)], timeout_s=timeout_s)
        if not still_there:
            return []
        raise PayloadMissing(
            f"episode {entry['episode_id']!r} lacks the payload of segments {missing}; discard it, and append it "
            "under another id"
        )
