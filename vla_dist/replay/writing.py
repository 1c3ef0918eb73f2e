"""Appending segments: images first, under an expiry, then rows and their commit in one transaction.

consumes: segments. waits for: the limiters, room, the archive. unblocked by: samples, evictions, the archiver.
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import partial
from typing import Any

from vla_dist.core.errors import ReplayWait, Unreachable
from vla_dist.core.protocols import AppendResult
from vla_dist.core.types import Segment
from vla_dist.data.segment_codec import SegmentCodec
from vla_dist.replay.arrivals import Arrival, ArrivalBatch, arrival_batches, encoded_ahead
from vla_dist.replay.image_uploads import ImageUploads
from vla_dist.replay.keys import Keys
from vla_dist.replay.link import Conversation, Deadline, RedisLink, Request, ServerFull, function_name
from vla_dist.replay.refusals import contradiction, wait_reason
from vla_dist.replay.wire import Command, ReplyError


class SegmentWriter:
    """Appends to one buffer; threads may share it."""

    def __init__(self, link: RedisLink, images: RedisLink | None, codec: SegmentCodec, keys: Keys) -> None:
        """
        Args:
            link: to the server of rows and metadata.
            images: to the server of the images; None: the same.
            codec: of the buffer.
            keys: of the buffer.
        """
        self._link = link
        self._images_link = images or link
        self._codec = codec
        self._keys = keys
        cameras = len(codec.image_codecs)
        self._images = ImageUploads(link, self._images_link, keys, cameras) if cameras else None
        self.on_wait: Callable[[], None] = _nothing
        """Called each time the limiter or the archive makes an append wait."""

    def append(
        self,
        segments: Sequence[Segment],
        *,
        timeout_s: float,
        frames: Sequence[Mapping[str, bytes | memoryview]] | None = None,
    ) -> list[AppendResult]:
        """Store each once; see ``RedisReplayTable.append_all``."""
        # All are checked before the first byte of any is sent.
        unsent = arrival_batches(self._codec, segments, frames)
        deadline = Deadline(timeout_s)
        batches: list[ArrivalBatch] = []
        arrivals: list[Arrival] = []

        def met() -> Iterator[ArrivalBatch]:
            for batch in unsent:
                batches.append(batch)
                arrivals.extend(batch.arrivals)
                yield batch

        stream = met()
        # Whatever the stream could not store is stored with patience.
        try:
            self._stream(stream, deadline)
        except (Unreachable, ServerFull):
            if deadline.left_s <= 0:
                raise
        for batch in (*batches, *stream):
            batch.keep_unstored()
            self._store(batch, deadline, timeout_s)
        for batch in batches:
            if batch.refused is not None:
                raise batch.refused
        return [arrival.result for arrival in arrivals if arrival.result is not None]

    def close(self) -> None:
        """Say what is left to say; the links are their owner's."""
        left = [] if self._images is None else self._images.forget_unlinked()
        if left:
            with contextlib.suppress(Unreachable):
                self._link.call(left, timeout_s=0.0)

    def _stream(self, batches: Iterator[ArrivalBatch], deadline: Deadline) -> None:
        """Store batches, each made ready while the one before it is stored; ends early where one is not stored at once.

        Raises Unreachable, ServerFull.
        """
        with contextlib.ExitStack() as stack:
            rows = stack.enter_context(self._link.converse(timeout_s=deadline.left_s))
            if self._images is None:
                self._stream_rows(batches, deadline, rows)
            else:
                frames = stack.enter_context(self._images_link.converse(timeout_s=deadline.left_s))
                ahead = stack.enter_context(contextlib.closing(encoded_ahead(batches)))
                self._stream_with_images(ahead, self._images, deadline, rows, frames)
                frames.receive()

    def _stream_rows(self, batches: Iterator[ArrivalBatch], deadline: Deadline, rows: Conversation) -> None:
        """Each batch is encoded while the one before it is committed."""
        previous: ArrivalBatch | None = None
        for batch in batches:
            request = Request.of(self._transaction(batch))
            rows.receive()
            # Sent before that answer, a batch could be stored before what comes first, and wait once more.
            if previous is not None and previous.stopped:
                return
            rows.send(request, partial(self._hear, batch, deadline))
            previous = batch
        rows.receive()

    def _stream_with_images(
        self,
        batches: Iterator[ArrivalBatch],
        images: ImageUploads,
        deadline: Deadline,
        rows: Conversation,
        frames: Conversation,
    ) -> None:
        """Each batch is committed while the images of the next are on their way; ends where some are there already."""
        taken: set[bytes] = set()
        committed: ArrivalBatch | None = None
        staged: ArrivalBatch | None = None
        for batch in itertools.chain(batches, [None]):
            if batch is not None:
                batch.staged = None
                frames.send(Request.of(images.staging(batch.arrivals)), partial(self._note_staged, batch))
            if staged is not None:
                request = Request.of(self._transaction(staged))
                while staged.staged is None:
                    frames.receive(leave=frames.num_pending - 1)
                # The commit before this one was done meanwhile.
                rows.receive()
                if not staged.staged or (committed is not None and committed.stopped):
                    return
                rows.send(request, partial(self._hear_with_images, staged, images, taken, deadline, frames))
                committed = staged
            staged = batch
        rows.receive()

    def _note_staged(self, batch: ArrivalBatch, replies: Sequence[Any]) -> None:
        # None stands for an image that was there: perhaps of an earlier attempt, perhaps of another segment.
        batch.staged = all(self._done(replies))

    def _hear(self, batch: ArrivalBatch, deadline: Deadline, replies: Sequence[Any]) -> None:
        """The answer to a commit in the stream."""
        answered, _ = self._judge(batch, replies, deadline)
        _assign(answered, lost=frozenset())

    def _hear_with_images(
        self,
        batch: ArrivalBatch,
        images: ImageUploads,
        taken: set[bytes],
        deadline: Deadline,
        frames: Conversation,
        replies: Sequence[Any],
    ) -> None:
        """The same, and what is to be done about the images then; ``taken`` as in ``ImageUploads.settlement``."""
        answered, images_gone = self._judge(batch, replies, deadline)
        settlement = images.settlement(answered, images_gone, taken)

        def settled(replies: Sequence[Any]) -> None:
            # Those without an expiry may be there or not: that is looked at with patience.
            _assign(answered, lost={digest for digest, _ in images.done(settlement, self._done(replies))})

        if settlement.commands:
            frames.send(Request.of(settlement.commands), settled)
        else:
            settled(())

    def _store(self, batch: ArrivalBatch, deadline: Deadline, timeout_s: float) -> None:
        """Commit all of ``batch``, again and again until it is stored."""
        while batch.arrivals:
            asked = batch.asks
            try:
                if self._images is not None and not batch.staged:
                    self._images.stage(batch.arrivals, timeout_s=deadline.left_s)
                    batch.staged = True
                commands = self._commands(batch, first_try=deadline.first)
                replies = self._link.exchange(commands, timeout_s=deadline.left_s)
                answered, images_gone = self._judge(batch, replies, deadline)
            except ServerFull as full:
                batch.asks, batch.wait_reason = False, str(full)
            else:
                lost: Set[str] = frozenset()
                if self._images is not None:
                    settlement = self._images.settlement(answered, images_gone, set())
                    lost = self._images.settle(settlement, timeout_s=deadline.left_s)
                if lost:
                    batch.staged, batch.wait_reason = False, "the server of the images forgot them"
                _assign(answered, lost=lost)
                batch.keep_unstored()
            if asked and not batch.asks:
                # It need not wait any more.
                continue
            if batch.arrivals and not deadline.pause():
                first = batch.arrivals[0].segment
                raise ReplayWait(
                    f"{len(batch.arrivals)} segments from {first.episode_id}/{first.segment_index} on were not stored "
                    f"within {timeout_s} s: {batch.wait_reason}. Append them again later."
                )

    def _judge(
        self, batch: ArrivalBatch, replies: Sequence[Any], deadline: Deadline
    ) -> tuple[list[tuple[Arrival, str]], bytes]:
        """The letters that the commit answered, see ``take_in`` in functions.lua, and the images it says are gone.

        Raises:
            ServerFull, Unreachable, DataError: the commit did not happen.
        """
        answer = replies[-1]
        if isinstance(answer, list) and len(answer) == 2:
            # Of a transaction: what it wrote, and what the commit in it answered.
            answer = answer[1]
        for reply in (*replies, answer):
            if isinstance(reply, ReplyError):
                raise self._link.meaning(reply)
        letters, last_indices, why, images_gone = answer
        answered = list(zip(batch.arrivals, letters.decode(), strict=False))
        numbers = iter(last_indices)
        asked, batch.asks = batch.asks, False
        batch.stopped = letters[-1:] in (b"m", b"w")
        for arrival, letter in answered:
            arrival.inserted |= letter in "oO"
            if letter == "c":
                batch.refused = batch.refused or contradiction(arrival.segment, next(numbers))
            elif letter == "w":
                batch.asks, batch.wait_reason = True, wait_reason("inserts", why)
                deadline.first = False
                self.on_wait()
            elif letter == "m" and not asked:
                batch.staged, batch.wait_reason = False, "the images expired before they were committed"
        return answered, images_gone

    def _transaction(self, batch: ArrivalBatch) -> list[Command]:
        """Rows and commit at once, without a copy of the rows in Lua; the reply to the commit is in the last one."""
        rows = {
            self._keys.row(arrival.digest, arrival.segment.segment_index): arrival.encoded.row
            for arrival in batch.arrivals
        }
        if len(rows) < len(batch.arrivals):
            # Of two with one name only the function knows which counts.
            return self._commands(batch, first_try=True)
        # Its own each time: what a transaction left behind whose commit failed must not be taken for this one's.
        token = os.urandom(8)
        commit = self._commit(batch, first_try=True, token=token)
        write = ("MSETNX", self._keys.fresh, token, *itertools.chain.from_iterable(rows.items()))
        return [*self._forget(), ("MULTI",), write, commit, ("EXEC",)]

    def _commands(self, batch: ArrivalBatch, *, first_try: bool) -> list[Command]:
        """The commit, last."""
        return [*self._forget(), self._commit(batch, first_try=first_try, token=b"")]

    def _commit(self, batch: ArrivalBatch, *, first_try: bool, token: bytes) -> Command:
        runs = batch.packed(with_rows=not token)
        return ("FCALL", function_name("commit"), 1, self._keys.state, int(first_try), token, *runs)

    def _forget(self) -> list[Command]:
        return [] if self._images is None else self._images.forget_unlinked()

    def _done(self, replies: Sequence[Any]) -> Sequence[Any]:
        """Replies of the server of the images. Raises what the first error among them means."""
        for reply in replies:
            if isinstance(reply, ReplyError):
                raise self._images_link.meaning(reply)
        return replies


def _assign(answered: Sequence[tuple[Arrival, str]], *, lost: Set[str]) -> None:
    """Results of what is stored; not of episodes whose digest is ``lost``: their images must come again."""
    for arrival, letter in answered:
        if letter == "c":
            arrival.result = "duplicate"
        elif letter not in "mw" and arrival.digest not in lost:
            arrival.result = "inserted" if arrival.inserted else "duplicate"


def _nothing() -> None:
    return
