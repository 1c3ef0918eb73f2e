"""Whether a buffer is whole: each stored byte against its checksum, each episode against the index, each key against
its owner; and what puts it right.

Others may read and write meanwhile: the index is compared in one snapshot, and what is wrong with an episode's payload
counts only if the episode is still there afterwards.
"""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vla_dist.core.errors import IntegrityError
from vla_dist.core.types import Segment
from vla_dist.replay.audit.findings import Finding
from vla_dist.replay.audit.index_check import IndexCheck, check_index
from vla_dist.replay.audit.inspection import Progress, no_progress
from vla_dist.replay.audit.snapshot import IndexSnapshot, owners_among, read_records
from vla_dist.replay.link import RedisLink
from vla_dist.replay.sweeping import sweep_images
from vla_dist.replay.table import RedisReplayTable
from vla_dist.replay.wire import Command

_PATIENCE_S = 30.0
_FETCH_BYTES = 16 << 20
_SCAN_PAGE = 2000
_PAGE = 1000
_SETTLE_S = 1.0
"""Images of a server of their own leave a moment after their episode, and lose their expiry a moment after it came."""
_STAGED_S = 60.0

Entry = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was looked at, and what is wrong."""

    episodes: int
    """Complete ones that were there to the end."""
    segments: int
    images: int
    num_bytes: int
    """Of payload read."""
    evicted: int
    """Left while we looked: not judged."""
    open_episodes: int
    """Not whole yet: only their place in the index is judged."""
    keys: int
    """Of payload, owned by somebody or not."""
    findings: tuple[Finding, ...]

    @property
    def clean(self) -> bool:
        return not self.findings


def verify(table: RedisReplayTable, on_progress: Progress = no_progress) -> Verification:
    """Look at everything; changes nothing. ``on_progress`` counts episodes. Raises Unreachable, NotFound."""
    snapshot = IndexSnapshot.take(table, timeout_s=_PATIENCE_S)
    index = check_index(table, snapshot)
    payload = _PayloadCheck(table, index, now_s=_server_time(table.link))
    for done, entry in enumerate(index.entries):
        on_progress(done, len(index.entries))
        payload.check(entry)
    on_progress(len(index.entries), len(index.entries))
    stored = owners_among(snapshot.episodes)
    strays = _Strays(table, {**stored, **{entry["digest"]: entry["num_segments"] for entry in index.entries}})
    strays.look_for()
    return Verification(
        episodes=len(index.entries) - payload.evicted,
        segments=payload.segments,
        images=payload.images,
        num_bytes=payload.num_bytes,
        evicted=payload.evicted,
        open_episodes=snapshot.num_open,
        keys=strays.seen,
        findings=(*index.findings, *payload.findings, *strays.findings),
    )


def repair(table: RedisReplayTable, findings: Sequence[Finding]) -> list[str]:
    """Do what the findings' remedies say, then set the counters right; returns what was done, in words.

    Damaged episodes are removed for good; ``verify`` again tells what is left. Raises Unreachable: call it again.
    """
    done = []
    for finding in findings:
        for link, commands in (
            (table.link, finding.commands),
            (table.images_link, finding.image_commands),
        ):
            if commands:
                link.call(commands, timeout_s=_PATIENCE_S)
                done.append(f"mended: {finding}")
    discarded: dict[int, list[Finding]] = {}
    for finding in findings:
        if finding.discard is not None:
            discarded.setdefault(finding.discard, []).append(finding)
    for completion, reasons in discarded.items():
        was_there = table.discard(completion)
        if not was_there:
            # Nothing else lists it: only its entry can be taken away.
            removed = table.link.call([("XDEL", table.keys.live, f"{completion}-0")], timeout_s=_PATIENCE_S)[0]
            was_there = bool(removed)
        done.append(f"{'discarded' if was_there else 'had left already'}: {reasons[0].where}")
    if table.images_link is not table.link:
        swept = sweep_images(table)
        done.append(f"swept the image server: {swept.removed} images removed, {swept.kept} kept from expiring")
    # What was mended and discarded has moved the counters, so they are judged anew.
    for finding in check_index(table, IndexSnapshot.take(table, timeout_s=_PATIENCE_S)).findings:
        for adjustment in finding.adjustments:
            if adjustment.table is None:
                command = ("HINCRBY", table.keys.by, adjustment.counter, int(adjustment.amount))
            else:
                command = table.function("adjust", adjustment.table, adjustment.counter, adjustment.amount)
            table.link.call([command], timeout_s=_PATIENCE_S)
            done.append(f"adjusted by {adjustment.amount:+.0f}: {finding.where}")
    return done


class _PayloadCheck:
    """Rows and images of complete episodes."""

    def __init__(self, table: RedisReplayTable, index: IndexCheck, *, now_s: float) -> None:
        self.findings: list[Finding] = []
        self.segments = self.images = self.num_bytes = self.evicted = 0
        self._table = table
        self._now_s = now_s
        self._cameras = list(table.codec.image_codecs)
        self._apart = table.images_link is not table.link
        frames = sum(codec.frame_bytes for codec in table.codec.image_codecs.values())
        self._at_once = max(1, _FETCH_BYTES // (table.codec.row_bytes + table.config.num_steps * frames))

    def check(self, entry: Entry) -> None:
        """Everything of one episode, unless it was evicted meanwhile."""
        findings, segments = [], []
        for first in range(0, entry["num_segments"], self._at_once):
            part = range(first, min(entry["num_segments"], first + self._at_once))
            findings += list(self._check_segments(entry, part, segments))
        if not findings and len(segments) == entry["num_segments"]:
            findings += [self._damaged(entry, what) for what in _wrong_together(entry, segments)]
        if findings and not self._is_there(entry):
            self.evicted += 1
            return
        self.findings += findings

    def _check_segments(self, entry: Entry, part: range, segments: list[Segment]) -> Iterator[Finding]:
        table, digest = self._table, entry["digest"]
        rows = [table.keys.row(digest, index) for index in part]
        images = [[table.keys.image(digest, index, camera) for index in part] for camera in range(len(self._cameras))]
        held, *expiries = table.link.call([("MGET", *rows), *(("PTTL", row) for row in rows)], timeout_s=_PATIENCE_S)
        columns: list[list[bytes | None]] = []
        image_expiries: list[int] = []
        for names in images:
            replies = table.images_link.call(
                [*(("GET", name) for name in names), *(("PTTL", name) for name in names)], timeout_s=_PATIENCE_S
            )
            columns.append(replies[: len(names)])
            image_expiries += replies[len(names) :]
        for place, index in enumerate(part):
            frames = {camera: columns[number][place] for number, camera in enumerate(self._cameras)}
            yield from self._check_segment(entry, index, held[place], frames, segments)
        staged = [name for name, expiry in zip(rows, expiries, strict=True) if expiry >= 0]
        staged_images = [
            name for name, expiry in zip(itertools.chain(*images), image_expiries, strict=True) if expiry >= 0
        ]
        if self._is_settling(entry):
            staged_images = []
        if staged or staged_images:
            apart = staged_images if self._apart else []
            here = staged if self._apart else staged + staged_images
            yield Finding(
                where=_name(entry),
                what=f"{len(staged) + len(staged_images)} of its payloads would expire: {', '.join(here + apart)}",
                commands=[("PERSIST", name) for name in here],
                image_commands=[("PERSIST", name) for name in apart],
            )

    def _check_segment(
        self, entry: Entry, index: int, row: bytes | None, frames: Mapping[str, bytes | None], segments: list[Segment]
    ) -> Iterator[Finding]:
        missing = [f"camera {camera!r}" for camera, data in frames.items() if data is None]
        if row is None:
            missing.insert(0, "the row")
        if row is not None and missing and self._is_settling(entry):
            return
        if row is None or missing:
            yield self._damaged(entry, f"segment {index}: {' and '.join(missing)} is missing")
            return
        images = {camera: data for camera, data in frames.items() if data is not None}
        self.segments += 1
        self.images += len(images)
        self.num_bytes += len(row) + sum(map(len, images.values()))
        try:
            segment = self._table.codec.decode(row, images)
        except IntegrityError as error:
            yield self._damaged(entry, f"segment {index}: {error}")
            return
        # Frames have been decoded: they are not needed any more, and an episode of them may be large.
        segments.append(replace(segment, images={}))
        for what in _wrong_alone(entry, index, segment):
            yield self._damaged(entry, f"segment {index}: {what}")

    def _is_settling(self, entry: Entry) -> bool:
        """Whether the writer may still be at the images of another server."""
        return self._apart and self._now_s - entry["completed_at_s"] < _STAGED_S

    def _is_there(self, entry: Entry) -> bool:
        completion = f"{entry['completion']}-0"
        (there,) = self._table.link.call(
            [("XRANGE", self._table.keys.live, completion, completion)], timeout_s=_PATIENCE_S
        )
        return bool(there)

    def _damaged(self, entry: Entry, what: str) -> Finding:
        return Finding(where=_name(entry), what=what, discard=entry["completion"])


def _wrong_alone(entry: Entry, index: int, segment: Segment) -> Iterator[str]:
    """What of a segment contradicts the index."""
    last = entry["num_segments"] - 1
    expected = {
        "episode_id": entry["episode_id"],
        "segment_index": index,
        "length": segment.num_steps if index < last else entry["length"] - last * segment.num_steps,
        "is_last": index == last,
        "policy_version": int(entry["policy_versions"][index]),
    }
    for name, value in expected.items():
        if getattr(segment, name) != value:
            yield f"{name} {getattr(segment, name)!r}, expected {value!r}"
    total = float(segment.rewards[: segment.length].sum(dtype=np.float64))
    if not np.isclose(total, entry["returns"][index], rtol=1e-9, atol=1e-9):
        yield f"its rewards sum up to {total!r}, the index says {float(entry['returns'][index])!r}"
    for name in ("proprio", "actions", "target_actions", "rewards"):
        if not np.isfinite(getattr(segment, name)[: segment.length]).all():
            yield f"{name} holds numbers that are not finite"


def _wrong_together(entry: Entry, segments: Sequence[Segment]) -> Iterator[str]:
    """What of all segments of an episode contradicts the index; it took each text from one of them."""
    if segments[-1].success != entry["success"]:
        yield f"success {segments[-1].success}, the index says {entry['success']}"
    intervened = any(segment.interventions[: segment.length].any() for segment in segments)
    if intervened != bool(entry["intervened"]):
        yield f"intervened {intervened}, the index says {bool(entry['intervened'])}"
    for name in ("task", "instruction", "source"):
        values = {getattr(segment, name) for segment in segments}
        if entry[name] not in values:
            yield f"{name} {' or '.join(sorted(map(repr, values)))}, the index says {entry[name]!r}"


class _Strays:
    """Payloads that no episode owns. Those under an expiry are on their way in, or will go by themselves."""

    def __init__(self, table: RedisReplayTable, owners: Mapping[str, int]) -> None:
        """``owners``: digest -> number of segments."""
        self.findings: list[Finding] = []
        self.seen = 0
        self._table = table
        self._owners = owners
        self._apart = table.images_link is not table.link

    def look_for(self) -> None:
        links = [self._table.link, *([self._table.images_link] if self._apart else [])]
        for link in links:
            strays = self._permanent(link, self._unowned(link))
            if strays:
                if self._apart:
                    time.sleep(_SETTLE_S)
                # They stood there before this second look at the owners: whoever owns one is among them.
                fresh = owners_among(read_records(self._table, timeout_s=_PATIENCE_S))
                self._owners = {**self._owners, **fresh}
                strays = self._permanent(link, [name for name in strays if not self._is_owned(name)])
            for name in strays:
                remedy: list[Command] = [("UNLINK", name)]
                here = link is self._table.link
                self.findings.append(
                    Finding(
                        where=name.decode(),
                        what="no episode owns this payload, and it would never expire",
                        commands=remedy if here else (),
                        image_commands=() if here else remedy,
                    )
                )

    def _unowned(self, link: RedisLink) -> list[bytes]:
        prefix, cursor, unowned = self._table.keys.prefix, b"0", []
        kinds = (f"{prefix}row:".encode(), f"{prefix}image:".encode())
        while True:
            scan = ("SCAN", cursor, "MATCH", f"{prefix}*", "COUNT", _SCAN_PAGE)
            cursor, names = link.call([scan], timeout_s=_PATIENCE_S)[0]
            payloads = [name for name in names if name.startswith(kinds)]
            self.seen += len(payloads)
            unowned += [name for name in payloads if not self._is_owned(name)]
            if cursor == b"0":
                return list(dict.fromkeys(unowned))

    def _is_owned(self, name: bytes) -> bool:
        kind, digest, *numbers = name.decode().removeprefix(self._table.keys.prefix).split(":")
        if not all(number.isdigit() for number in numbers) or len(numbers) != (1 if kind == "row" else 2):
            return False
        if kind == "image" and int(numbers[1]) >= len(self._table.codec.image_codecs):
            return False
        return int(numbers[0]) < self._owners.get(digest, 0)

    @staticmethod
    def _permanent(link: RedisLink, names: Sequence[bytes]) -> list[bytes]:
        permanent: list[bytes] = []
        for first in range(0, len(names), _PAGE):
            page = names[first : first + _PAGE]
            expiries = link.call([("PTTL", name) for name in page], timeout_s=_PATIENCE_S)
            permanent += [name for name, expiry in zip(page, expiries, strict=True) if expiry == -1]
        return permanent


def _name(entry: Entry) -> str:
    return f"episode {entry['episode_id']!r}"


def _server_time(link: RedisLink) -> float:
    seconds, micros = link.call([("TIME",)], timeout_s=_PATIENCE_S)[0]
    return int(seconds) + int(micros) / 1e6
