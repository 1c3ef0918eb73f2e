"""Whether the parts of a buffer's index agree with each other: in one snapshot, so nothing has moved in between."""

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_dist.core.types import SOURCES, Array, Source
from vla_dist.replay.audit.findings import Adjustment, Finding
from vla_dist.replay.audit.snapshot import COMPLETE, EVICTED, OPEN, EpisodeRecord, IndexSnapshot, pack_complete
from vla_dist.replay.config import Fifo, Prioritised
from vla_dist.replay.index import decode_entry
from vla_dist.replay.keys import episode_digest
from vla_dist.replay.table import RedisReplayTable

Entry = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class IndexCheck:
    """What is wrong with an index, and the episodes that it does know."""

    findings: tuple[Finding, ...]
    entries: tuple[Entry, ...]
    """Readable ones, in the order they became whole, each with its ``first_row``."""


def check_index(table: RedisReplayTable, snapshot: IndexSnapshot) -> IndexCheck:
    """Entries, records, lists, rings and counters of one snapshot."""
    check = _Check(table, snapshot)
    entries = list(check.read_entries())
    check.compare_records()
    check.compare_lists()
    check.compare_rings(entries)
    check.compare_counters(entries)
    return IndexCheck(findings=tuple(check.findings), entries=tuple(entries))


class _Check:
    def __init__(self, table: RedisReplayTable, snapshot: IndexSnapshot) -> None:
        self.findings: list[Finding] = []
        self._table = table
        self._config = table.config
        self._prefix = table.keys.prefix
        self._snapshot = snapshot
        self._live = {completion for completion, _ in snapshot.live}

    def read_entries(self) -> Iterator[Entry]:
        last_row = 0
        for completion, packed in self._snapshot.live:
            try:
                entry = decode_entry(packed)
                first_row = int(struct.unpack_from("<d", packed, 8)[0])
            except (struct.error, ValueError, IndexError) as error:
                self._damaged(completion, f"its entry in the index cannot be read ({error})")
                continue
            wrong = self._wrong_in_entry(entry, completion)
            if first_row < last_row:
                wrong = wrong or f"its rows begin at {first_row}, but those before it end at {last_row}"
            last_row = max(last_row, first_row + entry["num_segments"])
            if wrong:
                self._damaged(completion, wrong, entry["episode_id"])
                continue
            self._compare_with_record(entry)
            yield {**entry, "first_row": first_row}

    def compare_records(self) -> None:
        """What is said of episodes elsewhere than in the stream of complete ones."""
        snapshot = self._snapshot
        listed = self._live | set(snapshot.completed)
        for completion, episode_id in snapshot.completed.items():
            if completion not in self._live:
                record = snapshot.episodes.get(episode_id)
                if record is not None and record.status == COMPLETE and record.completion == completion:
                    self._damaged(completion, "it is complete, but not in the index: nobody can draw it", episode_id)
                else:
                    self._found(
                        f"'completed' lists it as number {completion}, which is not stored",
                        episode_id,
                        commands=[("HDEL", f"{self._prefix}completed", completion)],
                    )
        for episode_id, record in snapshot.episodes.items():
            if record is None:
                self._found("its record in 'episodes' cannot be read", episode_id)
            elif record.digest != episode_digest(episode_id):
                self._found(f"its record names payloads {record.digest}, not those of this episode", episode_id)
            elif record.status == COMPLETE and record.completion not in listed:
                listing = ("HSET", f"{self._prefix}completed", record.completion, episode_id)
                self._found(
                    "its record says complete, but no list has it: nobody can draw it",
                    episode_id,
                    commands=[listing],
                    discard=record.completion,
                )

    def compare_lists(self) -> None:
        snapshot = self._snapshot
        for episode_id, record in snapshot.episodes.items():
            if record is None:
                continue
            if record.status != EVICTED and episode_id not in snapshot.order:
                self._found(
                    "it is not in 'order' and would never be evicted",
                    episode_id,
                    commands=[("RPUSH", f"{self._prefix}order", episode_id)],
                )
            if record.status == EVICTED and episode_id not in snapshot.evicted:
                self._found(
                    "it is evicted, but not in 'evicted' and would never be forgotten",
                    episode_id,
                    commands=[("RPUSH", f"{self._prefix}evicted", episode_id)],
                )

    def compare_rings(self, entries: list[Entry]) -> None:
        """Priorities and draws of the rows that are stored, and what is used up."""
        numbers, lengths, completions = _rows(entries, self._config.num_steps)
        for number, table in enumerate(self._config.tables):
            if isinstance(table.sampler, Prioritised):
                self._check_priorities(number, numbers)
            if table.max_draws is not None:
                spent = self._spent(number, numbers, table.max_draws)
                self._check_used(number, completions[spent], lengths[spent])
            self._check_leftovers(number)

    def compare_counters(self, entries: list[Entry]) -> None:
        """Against the records, and the entries of those that have none: what an eviction will subtract."""
        snapshot, head = self._snapshot, self._snapshot.head
        stored = {entry["completion"]: (entry["length"], entry["task"], entry["source"]) for entry in entries}
        records = [record for record in snapshot.episodes.values() if record is not None]
        stored |= {r.completion: (r.steps, r.task, r.source) for r in records if r.status == COMPLETE}
        complete_steps = sum(steps for steps, _, _ in stored.values())
        truth = {
            "steps": complete_steps + sum(record.steps for record in records if record.status == OPEN),
            "complete": len(stored),
            "completion": max(head["completion"], *stored, *self._live, 0),
            "row": max(head["row"], *(entry["first_row"] + entry["num_segments"] for entry in entries), 0),
            "capacity": self._config.capacity_steps,
            "remembered": self._config.remembered_episodes,
        }
        if self._table.images_link is self._table.link:
            truth["cameras_here"] = len(self._table.spec.cameras)
        self._compare(-1, head, truth)
        for number, (table, counters) in enumerate(zip(self._config.tables, snapshot.tables, strict=True)):
            used = sum(steps for completion, steps in snapshot.used[number].items() if completion in stored)
            queue = isinstance(table.sampler, Fifo)
            truth = {
                "drawable": complete_steps - used,
                "max_draws": 1 if queue else table.max_draws or 0,
                "prioritised": float(isinstance(table.sampler, Prioritised)),
                "queue": float(queue),
            }
            self._compare(number, counters, truth)
        self._compare_by(stored.values())

    def _wrong_in_entry(self, entry: Entry, completion: int) -> str | None:
        if entry["completion"] != completion:
            return f"its entry says number {entry['completion']}, but stands at {completion}"
        if entry["digest"] != episode_digest(entry["episode_id"]):
            return f"its entry names payloads {entry['digest']}, not those of this episode"
        expected = -(-entry["length"] // self._config.num_steps)
        if entry["num_segments"] != expected or not expected:
            return f"its entry says {entry['num_segments']} segments for {entry['length']} steps, expected {expected}"
        return None if np.isfinite(entry["returns"]).all() else "its entry holds rewards that are not finite"

    def _compare_with_record(self, entry: Entry) -> None:
        episode_id, completion = entry["episode_id"], entry["completion"]
        listed = self._snapshot.completed.get(completion)
        if listed != episode_id:
            self._found(
                f"'completed' holds {listed!r} as number {completion} instead of it",
                episode_id,
                commands=[("HSET", f"{self._prefix}completed", completion, episode_id)],
            )
        expected = EpisodeRecord(
            completion=completion,
            num_segments=entry["num_segments"],
            steps=entry["length"],
            status=COMPLETE,
            source=entry["source"],
            digest=entry["digest"],
            task=entry["task"],
        )
        record = self._snapshot.episodes.get(episode_id)
        if record != expected:
            self._found(
                f"its record in 'episodes' is {record}, expected {expected}" if record else "it has no readable record",
                episode_id,
                commands=[("HSET", f"{self._prefix}episodes", episode_id, pack_complete(entry))],
            )

    def _check_priorities(self, number: int, numbers: Array) -> None:
        ring = self._snapshot.priorities[number]
        values = self._ring_values("priorities", number, ring, numbers, "<f4")
        bad = ~(np.isfinite(values) & (values > 0))
        if bad.any():
            top = self._snapshot.tables[number]["max_priority"]
            pairs = np.stack([numbers[bad], np.full(bad.sum(), top)], axis=1).astype("<f8")
            self._found(
                f"{bad.sum():,} stored segments have no priority above 0: they would never be drawn",
                self._name("priorities", number),
                commands=[self._table.function("reprioritise", number, pairs.tobytes())],
            )

    def _spent(self, number: int, numbers: Array, max_draws: int) -> Array:
        """Positions of the rows that may not be drawn any more."""
        ring = self._snapshot.draws[number]
        counts = self._ring_values("draws", number, ring, numbers, "<u4")
        places = numbers % self._config.capacity_steps
        beyond = (places + 1) * 4 > len(ring)
        if beyond.any():
            key, end = self._table.keys.of_table("draws", number), (int(places.max()) + 1) * 4
            self._found(
                f"the ring of draws holds {len(ring):,} bytes, expected at least {end:,}: {beyond.sum():,} stored "
                "segments have no count",
                self._name("draws", number),
                commands=[("SETRANGE", key, end - 4, bytes(4))],
            )
        return np.flatnonzero(counts >= max_draws)

    def _ring_values(self, kind: str, number: int, ring: bytes, numbers: Array, dtype: str) -> Array:
        """(N,) values of rows (N,), 0 where the ring is too short."""
        most = 4 * self._config.capacity_steps
        if len(ring) % 4 or len(ring) > most:
            self._found(
                f"the ring holds {len(ring):,} bytes, expected a multiple of 4 up to {most:,}", self._name(kind, number)
            )
        held = np.frombuffer(ring, dtype, len(ring) // 4)
        places = numbers % self._config.capacity_steps
        values = np.zeros(len(numbers), dtype)
        inside = places < len(held)
        values[inside] = held[places[inside]]
        return values

    def _check_used(self, number: int, completions: Array, lengths: Array) -> None:
        used, key = self._snapshot.used[number], self._table.keys.of_table("used", number)
        distinct, at = np.unique(completions, return_inverse=True)
        steps = np.bincount(at, lengths, len(distinct)).astype(int).tolist()
        spent = dict(zip(distinct.tolist(), steps, strict=True))
        for completion in sorted(self._live & (set(used) | set(spent))):
            amount = spent.get(completion, 0) - used.get(completion, 0)
            if amount:
                self._found(
                    f"{used.get(completion, 0)} steps of number {completion} are counted as used up, expected "
                    f"{spent.get(completion, 0)} from its draws",
                    self._name("used", number),
                    commands=[("HINCRBY", key, completion, amount)],
                )

    def _check_leftovers(self, number: int) -> None:
        for completion in self._snapshot.used[number]:
            if completion not in self._live:
                self._found(
                    f"steps of number {completion}, which is not stored, are counted as used up",
                    self._name("used", number),
                    commands=[("HDEL", self._table.keys.of_table("used", number), completion)],
                )

    def _compare_by(self, stored: Iterable[tuple[int, str, Source]]) -> None:
        truth: dict[str, int] = {}
        for steps, task, source in stored:
            for name, amount in ((f"task:{task}", 1), (f"source:{SOURCES.index(source)}", steps)):
                truth[name] = truth.get(name, 0) + amount
        for name in sorted(set(truth) | set(self._snapshot.by)):
            got, expected = self._snapshot.by.get(name, 0), truth.get(name, 0)
            if got != expected:
                self._found(
                    f"counts {got}, expected {expected} from what is stored",
                    f"counter {name}",
                    adjustments=[Adjustment(table=None, counter=name, amount=expected - got)],
                )

    def _compare(self, number: int, counters: Mapping[str, float], truth: Mapping[str, float]) -> None:
        where = "" if number < 0 else f" of table {self._config.tables[number].name!r}"
        for name, expected in truth.items():
            if counters[name] != expected:
                self._found(
                    f"counts {counters[name]:.0f}, expected {expected:.0f} from what is stored",
                    f"counter {name}{where}",
                    adjustments=[Adjustment(table=number, counter=name, amount=expected - counters[name])],
                )

    def _name(self, kind: str, number: int) -> str:
        return f"{kind} of table {self._config.tables[number].name!r}"

    def _damaged(self, completion: int, what: str, episode_id: str = "") -> None:
        known = episode_id or self._snapshot.completed.get(completion, f"number {completion}")
        self._found(what, known, discard=completion)

    def _found(self, what: str, where: str, **remedies: Any) -> None:
        self.findings.append(Finding(what=what, where=where, **remedies))


def _rows(entries: list[Entry], num_steps: int) -> tuple[Array, Array, Array]:
    """(N,) numbers of the stored rows, their lengths and the completions of their episodes."""
    nums = np.array([entry["num_segments"] for entry in entries], np.int64)
    # Segment within its episode, for all rows at once.
    segments = np.arange(nums.sum()) - np.repeat(np.cumsum(nums) - nums, nums)
    first_rows, totals, completions = (
        np.repeat(np.array([entry[name] for entry in entries], np.int64), nums)
        for name in ("first_row", "length", "completion")
    )
    return first_rows + segments, np.minimum(num_steps, totals - num_steps * segments), completions
