"""Writing images in step with the commits of their rows; see ``sweeping`` about those on a server of their own."""

import threading
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

from vla_dist.replay.arrivals import Arrival
from vla_dist.replay.keys import Keys
from vla_dist.replay.link import RedisLink
from vla_dist.replay.sweeping import ImagesGone
from vla_dist.replay.wire import Command

_STAGE_MS = b"3600000"
"""Between commit and the removal of the expiry lies another connection."""


@dataclass(frozen=True, slots=True)
class Settlement:
    """What is to be done about images once their batch was committed."""

    commands: list[Command]
    """The first of them take off expiries, one for each of ``kept``."""
    kept: list[tuple[str, str]]
    """Digest of the episode and name of each image that stays."""
    gone: list[bytes]
    """Entries of ``ImagesGone`` whose images are removed."""


class ImageUploads:
    """Images of one writer's segments; threads may share it."""

    def __init__(self, link: RedisLink, images: RedisLink, keys: Keys, num_cameras: int) -> None:
        """``link`` leads to the main server, ``images`` to that of the images, which may be the same."""
        self._images = images
        self._keys = keys
        self._num_cameras = num_cameras
        # Of its own images the main server takes care.
        self._gone = None if images is link else ImagesGone(link, images, keys, num_cameras)
        self._lock = threading.Lock()
        self._unlinked: list[bytes] = []

    def staging(self, arrivals: Sequence[Arrival]) -> list[Command]:
        """Put images there under an expiry, unless they are there: such are answered None."""
        return [(*command, b"NX") for command in self._stores(arrivals)]

    def stage(self, arrivals: Sequence[Arrival], *, timeout_s: float) -> None:
        """Do that. Raises Unreachable, ServerFull."""
        answers = self._images.call(self.staging(arrivals), timeout_s=timeout_s)
        there = [place for place, answer in enumerate(answers) if answer is None]
        if not there:
            return
        # Frames that are there and still expire are those of an earlier attempt, perhaps of another segment.
        commands = self._stores(arrivals)
        left_ms = self._images.call([("PTTL", commands[place][1]) for place in there], timeout_s=timeout_s)
        again = [commands[place] for place, left in zip(there, left_ms, strict=True) if left > 0]
        if again:
            self._images.call(again, timeout_s=timeout_s)

    def settlement(self, answered: Sequence[tuple[Arrival, str]], images_gone: bytes, taken: set[bytes]) -> Settlement:
        """Images outlive their expiry once their row is committed, and leave with it.

        Args:
            answered: arrivals with their letters, see ``take_in`` in functions.lua.
            images_gone: the commit's word on what was evicted.
            taken: entries of it that earlier settlements of the same stream deal with, which are on the list until the
                server is told; this one's are added.
        """
        if self._gone is None:
            return Settlement([], [], [])
        unlink: list[Command] = []
        kept: list[tuple[str, str]] = []
        for arrival, letter in answered:
            names = self._names(arrival)
            if letter in "cOD" and names:
                unlink.append(("UNLINK", *names))
            elif letter in "od":
                kept += [(arrival.digest, name) for name in names]
        # An episode that was forgotten and begun again may leave again.
        begun = {arrival.digest.encode() for arrival, letter in answered if letter == "o"}
        taken -= {entry for entry in taken if ImagesGone.digest(entry) in begun}
        gone = [entry for entry in ImagesGone.split(images_gone) if entry not in taken]
        taken |= set(gone)
        persist: list[Command] = [("PERSIST", name) for _, name in kept]
        return Settlement([*persist, *unlink, *self._gone.unlink(gone)], kept, gone)

    def done(self, settlement: Settlement, replies: Sequence[Any]) -> list[tuple[str, str]]:
        """Of ``settlement.kept`` those that had no expiry before, or are not there at all."""
        with self._lock:
            self._unlinked += settlement.gone
        return [pair for pair, done in zip(settlement.kept, replies, strict=False) if not done]

    def settle(self, settlement: Settlement, *, timeout_s: float) -> Set[str]:
        """Digests of the episodes whose images vanished between upload and commit.

        Those must come again, and be committed again, because the episode may have been evicted meanwhile.
        """
        if not settlement.commands:
            return frozenset()
        doubtful = self.done(settlement, self._images.call(settlement.commands, timeout_s=timeout_s))
        if not doubtful:
            return frozenset()
        present = self._images.call([("EXISTS", name) for _, name in doubtful], timeout_s=timeout_s)
        return {digest for (digest, _), there in zip(doubtful, present, strict=True) if not there}

    def forget_unlinked(self) -> list[Command]:
        """For the main server, in a round trip that is made anyway: takes entries with removed images off the list.

        Where that fails they stay on the list, and their images are removed once more.
        """
        if self._gone is None:
            return []
        with self._lock:
            unlinked, self._unlinked = self._unlinked, []
        return self._gone.forget(unlinked)

    def _stores(self, arrivals: Sequence[Arrival]) -> list[Command]:
        return [
            ("SET", name, data, b"PX", _STAGE_MS)
            for arrival in arrivals
            for name, data in zip(self._names(arrival), arrival.encoded.images.values(), strict=True)
        ]

    def _names(self, arrival: Arrival) -> list[str]:
        index = arrival.segment.segment_index
        return [self._keys.image(arrival.digest, index, number) for number in range(self._num_cameras)]
