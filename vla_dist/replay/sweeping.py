"""What keeps images on a server of their own in step with the episodes on the main one.

Nothing can change both servers at once, so the order is: images first, under an expiry; then the commit; then the
expiry is taken off. What an eviction leaves behind is listed on the main server until somebody has removed it. A writer
that died in between, or an image server that lost its data, leaves what ``sweep_images`` finds.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vla_dist.replay.keys import Keys
from vla_dist.replay.link import RedisLink
from vla_dist.replay.wire import Command

if TYPE_CHECKING:
    from vla_dist.replay.table import RedisReplayTable

_PAGE = 1000
_MOST_LISTED = 100_000
# See EPISODE and SEGMENT in functions.lua.
_EPISODE = struct.Struct("<diIIBBBB16sH")
_SEGMENT = struct.Struct("<dd")
_OPEN, _EVICTED = 0, 2
_GONE_BYTES = 20


class ImagesGone:
    """The main server's list of episodes that left while their images may still lie on the other server."""

    def __init__(self, link: RedisLink, images: RedisLink, keys: Keys, num_cameras: int) -> None:
        """``link`` leads to the main server, ``images`` to the other."""
        self._link = link
        self._images = images
        self._keys = keys
        self._num_cameras = num_cameras

    @property
    def command(self) -> Command:
        """Asks for the oldest of the list."""
        return ("LRANGE", self._keys.images_gone, 0, 127)

    def remove(self, gone: Sequence[bytes], *, timeout_s: float) -> int:
        """Remove the images of these entries of the list, then the entries; returns how many images there were.

        Harmless when another client does the same at the same time. Raises Unreachable: the list keeps them.
        """
        if not gone:
            return 0
        removed = sum(self._images.call(self.unlink(gone), timeout_s=timeout_s))
        self._link.call(self.forget(gone), timeout_s=timeout_s)
        return removed

    def unlink(self, gone: Sequence[bytes]) -> list[Command]:
        """For the server of the images: removes those of these entries."""
        commands: list[Command] = []
        for entry in gone:
            digest, (num,) = self.digest(entry).decode(), struct.unpack("<I", entry[16:])
            names = [self._keys.image(digest, i, camera) for i in range(num) for camera in range(self._num_cameras)]
            commands += [("UNLINK", *names[at : at + _PAGE]) for at in range(0, len(names), _PAGE)]
        return commands

    def forget(self, gone: Sequence[bytes]) -> list[Command]:
        """For the main server, once the images are removed: takes these entries off the list."""
        return [("LREM", self._keys.images_gone, 0, entry) for entry in gone]

    def remove_all(self, *, timeout_s: float) -> int:
        """The same for the whole list; ``timeout_s`` is for each page of it."""
        removed = 0
        while gone := self._link.call([self.command], timeout_s=timeout_s)[0]:
            removed += self.remove(gone, timeout_s=timeout_s)
        return removed

    @staticmethod
    def digest(entry: bytes) -> bytes:
        """Of the episode that left."""
        return entry[:16]

    @staticmethod
    def split(packed: bytes) -> list[bytes]:
        """Entries from the joined form in which ``commit`` answers them."""
        return [packed[at : at + _GONE_BYTES] for at in range(0, len(packed), _GONE_BYTES)]


@dataclass(frozen=True, slots=True, kw_only=True)
class SweptImages:
    """What ``sweep_images`` put right."""

    removed: int
    """Images whose episode is not stored."""
    kept: int
    """Images of stored segments that would have expired: their writer died after the commit."""
    discarded: int
    """Episodes that were removed because part of their payload was missing."""


def sweep_images(table: "RedisReplayTable", *, timeout_s: float = 10.0) -> SweptImages:
    """Bring the images of a buffer in step with its episodes, while others read and write.

    Where images lie on the main server only incomplete episodes are looked for.

    Args:
        timeout_s: for each page; there is one for about a thousand images.

    Raises:
        Unreachable: no answer; what was done stays done, and it may be called again.
    """
    removed = kept = 0
    if table.images_link is not table.link and table.codec.image_codecs:
        gone = ImagesGone(table.link, table.images_link, table.keys, len(table.codec.image_codecs))
        removed = gone.remove_all(timeout_s=timeout_s)
        for listed in _listed_images(table, timeout_s):
            # Listed before the episodes are: what is permanent and has no episode then never gets one.
            strays, staged = _out_of_step(table, listed, timeout_s)
            commands = [("UNLINK", *strays[at : at + _PAGE]) for at in range(0, len(strays), _PAGE)]
            removed += sum(table.images_link.call(commands, timeout_s=timeout_s))
            kept += sum(table.images_link.call([("PERSIST", name) for name in staged], timeout_s=timeout_s))
    return SweptImages(removed=removed, kept=kept, discarded=table.discard_incomplete(timeout_s=timeout_s))


def _listed_images(table: "RedisReplayTable", timeout_s: float) -> Iterator[list[tuple[bytes, bool]]]:
    """Names of images, each with whether it is permanent, many at a time."""
    cursor, listed = b"0", []
    while True:
        # Braces mean nothing in the server's patterns.
        scan = ("SCAN", cursor, "MATCH", f"{table.keys.prefix}image:*", "COUNT", _PAGE)
        cursor, names = table.images_link.call([scan], timeout_s=timeout_s)[0]
        expiries = table.images_link.call([("PTTL", name) for name in names], timeout_s=timeout_s)
        listed += [(name, expiry == -1) for name, expiry in zip(names, expiries, strict=True) if expiry != -2]
        if cursor == b"0" or len(listed) >= _MOST_LISTED:
            yield listed
            listed = []
        if cursor == b"0":
            return


def _out_of_step(
    table: "RedisReplayTable", listed: list[tuple[bytes, bool]], timeout_s: float
) -> tuple[list[bytes], list[bytes]]:
    """Names that are permanent and belong to no stored segment; names that are not, and do."""
    stored = _stored_segments(table, timeout_s)
    strays, staged = [], []
    for name, permanent in listed:
        digest, index, _ = name.decode().removeprefix(f"{table.keys.prefix}image:").rsplit(":", 2)
        is_stored = stored.get(digest, lambda _: False)(int(index))
        if permanent and not is_stored:
            strays.append(name)
        elif is_stored and not permanent:
            staged.append(name)
    return strays, staged


def _stored_segments(table: "RedisReplayTable", timeout_s: float) -> dict[str, Any]:
    """Digest of each stored episode -> function of an index to whether that segment is stored."""
    stored: dict[str, Any] = {}
    cursor = b"0"
    while True:
        scan = ("HSCAN", f"{table.keys.prefix}episodes", cursor, "COUNT", _PAGE)
        cursor, fields = table.link.call([scan], timeout_s=timeout_s)[0]
        for packed in fields[1::2]:
            _, last_index, _, _, status, _, _, _, digest, task_bytes = _EPISODE.unpack_from(packed)
            if status == _OPEN:
                stored[digest.decode()] = _seen(packed[_EPISODE.size + task_bytes :])
            elif status != _EVICTED:
                stored[digest.decode()] = range(last_index + 1).__contains__
        if cursor == b"0":
            return stored


def _seen(segments: bytes) -> Any:
    sums = [total for total, _ in _SEGMENT.iter_unpack(segments)]
    # Not a number stands for a segment that has not come yet.
    return {index for index, total in enumerate(sums) if total == total}.__contains__
