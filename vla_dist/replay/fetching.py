"""From drawn steps to a batch: which bytes to ask for, and how they become arrays.

A window costs its own steps and frames, not whole segments. Payloads are never overwritten, only removed, so what comes
back is whole or missing.

Dimensions: B windows, K context steps, F future steps, T segment steps, N pieces, D numbers of a step.
"""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np

from vla_dist.core.types import SOURCES, Array, Batch
from vla_dist.data.segment_codec import SegmentCodec
from vla_dist.data.windows import WindowPieces
from vla_dist.replay.index import EpisodeIndex
from vla_dist.replay.keys import Keys
from vla_dist.replay.link import Deadline, RedisLink
from vla_dist.replay.recycling import RecycledMemory
from vla_dist.replay.samplers import Drawn
from vla_dist.replay.wire import BulkLayout

_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WindowPlan:
    """All that is needed to fetch and assemble a batch, copied from the index so that it may change meanwhile."""

    pieces: WindowPieces
    """Of K + F steps."""
    frame_pieces: WindowPieces
    """Of the K steps whose frames are wanted; the same where F is 0."""
    digests: Array
    """(B,) S16, of the episodes."""
    tail_returns: Array
    """(N,) float64, reward that the episode still collects after each piece's segment."""
    numbers: Array
    """(B,) int64, of the rows in which the windows end."""
    completions: Array
    """(B,) int64, of the episodes."""
    row_lengths: Array
    """(B,) int64, of those rows."""
    episode_lengths: Array
    success: Array
    policy_versions: Array
    completed_at_s: Array
    sources: list[int]
    tasks: list[str]
    instructions: list[str]
    weights: Array | None

    @classmethod
    def of(cls, index: EpisodeIndex, drawn: Drawn, *, context_steps: int, future_steps: int) -> "WindowPlan":
        rows, episodes = index.rows, index.episodes
        segments = rows["segment"][drawn.rows].astype(np.int64)
        of_window = rows["episode"][drawn.rows]
        lengths = episodes["length"][of_window].astype(np.int64)
        around = partial(
            WindowPieces.around, segments, drawn.offsets, context_steps=context_steps, num_steps=index.num_steps
        )
        pieces = around(future_steps=future_steps, episode_lengths=lengths)
        # The rows of an episode stand side by side, so another segment is found by its distance.
        piece_rows = drawn.rows[pieces.windows] - (segments[pieces.windows] - pieces.segments)
        return cls(
            pieces=pieces,
            frame_pieces=around() if future_steps else pieces,
            digests=episodes["digest"][of_window],
            tail_returns=rows["tail_return"][piece_rows],
            numbers=rows["number"][drawn.rows],
            completions=episodes["completion"][of_window],
            row_lengths=rows["length"][drawn.rows].astype(np.int64),
            episode_lengths=lengths,
            success=episodes["success"][of_window].astype(bool),
            policy_versions=rows["policy_version"][drawn.rows],
            completed_at_s=episodes["completed_at_s"][of_window],
            sources=episodes["source"][of_window].tolist(),
            tasks=[index.tasks.by_number[n] for n in episodes["task"][of_window].tolist()],
            instructions=[index.instructions.by_number[n] for n in episodes["instruction"][of_window].tolist()],
            weights=drawn.weights,
        )


class WindowFetcher:
    """Fetches the windows of one buffer; threads may share it."""

    def __init__(
        self, link: RedisLink, images: RedisLink, codec: SegmentCodec, keys: Keys, *, context_steps: int
    ) -> None:
        """``link`` leads to the rows, ``images`` to the frames; they may be the same."""
        self._link = link
        self._images = images
        self._codec = codec
        self._keys = keys
        self._context_steps = context_steps
        self._memory = RecycledMemory()
        self._rows = _RangeRequests(
            f"{keys.prefix}row:", "", offset=codec.steps_offset, stride=codec.step_bytes, num_steps=codec.num_steps
        )
        self._frames = [
            _RangeRequests(
                f"{keys.prefix}image:", f":{number}", offset=0, stride=image.frame_bytes, num_steps=codec.num_steps
            )
            for number, image in enumerate(codec.image_codecs.values())
        ]

    def fetch(self, plan: WindowPlan, deadline: Deadline, *, now_s: float) -> tuple[Batch, Array]:
        """The batch, and (B,) bool, windows of which something was evicted meanwhile: those hold anything."""
        pieces, layout = plan.pieces, self._codec.layout
        arena, starts = self._fetch_steps(plan, deadline)
        missing = starts < 0
        gone = np.zeros(len(plan.numbers), bool)
        gone[pieces.windows[missing]] = True
        images = {}
        for number, camera in enumerate(self._codec.spec.cameras):
            fetch = self._fetch_raw if self._codec.image_codecs[camera.name].is_raw else self._fetch_packed
            images[camera.name] = fetch(plan, number, gone, deadline)
        index = pieces.step_index()
        steps = self._gather(pieces, index, arena, np.where(missing, 0, starts))
        tails = np.concatenate([[0.0], np.repeat(plan.tail_returns, pieces.counts)])[index]
        with np.errstate(invalid="ignore", over="ignore"):  # The steps of windows that are gone are any numbers.
            own = steps[..., layout.segment_return].astype(np.float64) + steps[..., layout.segment_return + 1]
            returns_to_go = (tails + own).astype(np.float32)
        # Of the future only what is to be imitated is of use.
        future = None
        if pieces.padding_mask.shape[1] > self._context_steps:
            future = steps[:, self._context_steps :, layout.target_actions]
            steps, returns_to_go = steps[:, : self._context_steps], returns_to_go[:, : self._context_steps]
        batch = Batch(
            proprio=steps[..., layout.proprio],
            actions=steps[..., layout.actions],
            target_actions=steps[..., layout.target_actions],
            rewards=steps[..., layout.reward],
            interventions=steps[..., layout.intervention] != 0,
            returns_to_go=returns_to_go,
            timesteps=pieces.timesteps[:, : self._context_steps],
            padding_mask=pieces.padding_mask[:, : self._context_steps],
            future_target_actions=future,
            future_mask=None if future is None else pieces.padding_mask[:, self._context_steps :],
            episode_lengths=plan.episode_lengths,
            success=plan.success,
            policy_versions=plan.policy_versions,
            instructions=tuple(plan.instructions),
            tasks=tuple(plan.tasks),
            sources=tuple(SOURCES[source] for source in plan.sources),
            images=images,
            ages_s=np.maximum(0.0, now_s - plan.completed_at_s),
            items=plan.numbers,
            weights=plan.weights,
        )
        return batch, gone

    def _fetch_steps(self, plan: WindowPlan, deadline: Deadline) -> tuple[Array, Array]:
        """Received bytes, and (N,) where each piece starts in them; -1 where it was missing."""
        pieces, size = plan.pieces, self._codec.step_bytes
        layout = BulkLayout(pieces.counts * size)
        arena = self._memory.take(layout.num_bytes)
        request = self._rows.pack(pieces, plan.digests[pieces.windows].tolist())
        return self._link.bulks(request, layout, arena, timeout_s=deadline.left_s)

    def _gather(self, pieces: WindowPieces, index: Array, arena: Array, starts: Array) -> Array:
        """(B, K, D) float32, zero where padded."""
        size = self._codec.step_bytes
        num = int(pieces.counts.sum())
        within = np.arange(num) - np.repeat(np.cumsum(pieces.counts) - pieces.counts, pieces.counts)
        places = np.concatenate([[0], np.repeat(starts, pieces.counts) + within * size])[index]
        # Every byte of the arena may be the start of a step: replies have headers of any length between them.
        records = np.ndarray((len(arena) - size + 1,), np.dtype((np.void, size)), arena, strides=(1,))
        steps = records[places].view("<f4").reshape(*places.shape, self._codec.layout.num_columns)
        if not pieces.padding_mask.all():
            steps[~pieces.padding_mask] = 0
        return steps

    def _fetch_raw(self, plan: WindowPlan, camera: int, gone: Array, deadline: Deadline) -> Array:
        """(B, K, H, W, 3) uint8, received where it belongs; zero where padded."""
        pieces, spec = plan.frame_pieces, self._codec.spec.cameras[camera]
        codec = self._codec.image_codecs[spec.name]
        shape = (len(plan.numbers), self._context_steps, *codec.frame_shape)
        frames = self._memory.take(math.prod(shape)).reshape(shape)
        for window in np.flatnonzero(pieces.num_valid < self._context_steps).tolist():
            frames[window, : self._context_steps - int(pieces.num_valid[window])] = 0
        flat = frames.reshape(-1).data
        ends = pieces.segments * self._codec.num_steps + pieces.firsts + pieces.counts
        last = pieces.timesteps[pieces.windows, -1] + 1
        positions = pieces.windows * self._context_steps + self._context_steps - (last - ends) - pieces.counts
        targets = [
            flat[start : start + length]
            for start, length in zip(
                (positions * codec.frame_bytes).tolist(), (pieces.counts * codec.frame_bytes).tolist(), strict=True
            )
        ]
        request = self._frames[camera].pack(pieces, plan.digests[pieces.windows].tolist())
        taken = np.array(self._images.bulks_into(request, targets, timeout_s=deadline.left_s))
        gone[pieces.windows[~taken]] = True
        return frames

    def _fetch_packed(self, plan: WindowPlan, camera: int, gone: Array, deadline: Deadline) -> Array:
        """The same from compressed frames: each touched segment comes once and whole."""
        pieces, spec = plan.frame_pieces, self._codec.spec.cameras[camera]
        codec = self._codec.image_codecs[spec.name]
        frames = np.zeros((len(plan.numbers), self._context_steps, *codec.frame_shape), np.uint8)
        names = [
            self._keys.image(digest.decode(), segment, camera)
            for digest, segment in zip(plan.digests[pieces.windows].tolist(), pieces.segments.tolist(), strict=True)
        ]
        distinct = list(dict.fromkeys(names))
        values = self._images.call([("GET", name) for name in distinct], timeout_s=deadline.left_s)
        stored = dict(zip(distinct, values, strict=True))
        filled = np.zeros(len(plan.numbers), np.int64)
        for number, name in enumerate(names):
            window, count = int(pieces.windows[number]), int(pieces.counts[number])
            data = stored[name]
            if data is None:
                gone[window] = True
                continue
            first = int(pieces.firsts[number])
            # Only the table of frames is needed to find some of them; how many there are is its own length.
            start = self._context_steps - int(pieces.num_valid[window]) + int(filled[window])
            num_frames = self._frames_of(plan, window, int(pieces.segments[number]))
            frames[window, start : start + count] = codec.unpack(data, num_frames, first, count)
            filled[window] += count
        return frames

    def _frames_of(self, plan: WindowPlan, window: int, segment: int) -> int:
        """Frames of a segment: T, or what is left for the last one."""
        num_steps = self._codec.num_steps
        return min(num_steps, int(plan.episode_lengths[window]) - segment * num_steps)


class _RangeRequests:
    """Packs GETRANGE commands of ``prefix DIGEST:SEGMENT suffix``; every part but the digest comes out of a table."""

    def __init__(self, prefix: str, suffix: str, *, offset: int, stride: int, num_steps: int) -> None:
        """
        Args:
            offset: of the first step within a value.
            stride: bytes of a step.
            num_steps: T.
        """
        self._prefix = prefix.encode()
        self._suffix = suffix.encode()
        self._segments: list[tuple[bytes, bytes]] = []
        self._width = num_steps + 1
        ends = [
            (str(offset + first * stride), str(offset + (first + count) * stride - 1))
            for first in range(num_steps)
            for count in range(self._width)
        ]
        self._ranges = [f"\r\n${len(a)}\r\n{a}\r\n${len(b)}\r\n{b}\r\n".encode() for a, b in ends]

    def pack(self, pieces: WindowPieces, digests: list[bytes]) -> bytes:
        """One command for each piece."""
        segments = pieces.segments.tolist()
        for segment in range(len(self._segments), max(segments) + 1):
            end = b":%d%b" % (segment, self._suffix)
            size = len(self._prefix) + _DIGEST_BYTES + len(end)
            self._segments.append((b"*4\r\n$8\r\nGETRANGE\r\n$%d\r\n%b" % (size, self._prefix), end))
        table, ranges = self._segments, self._ranges
        parts: list[bytes] = []
        for segment, digest, place in zip(
            segments, digests, (pieces.firsts * self._width + pieces.counts).tolist(), strict=True
        ):
            head, end = table[segment]
            parts += (head, digest, end, ranges[place])
        return b"".join(parts)
