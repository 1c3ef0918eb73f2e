"""Segments on the robot's disk until the server has them: what was put outlives the process and the power.

An episode is ``open`` while it is recorded, ``closed`` when its record is stored with it, and ``done`` when the server
has all of it. The newest segment of an open episode is not offered for upload: should the power fail, it becomes the
last one, and an episode that was cut off ends as a partial one that can still be trained on.
"""

import shutil
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from vla_dist.core.errors import ConfigError, DataError, ResourceMissing
from vla_dist.core.types import Metrics, Segment
from vla_dist.protocol.fleet_conversion import decode_episode, encode_episode
from vla_dist.protocol.fleet_records import EpisodeRecord
from vla_dist.protocol.records import Ack, SegmentKey
from vla_dist.protocol.v1 import fleet_pb2, types_pb2
from vla_dist.robot.frames import PackedImages, upload_request
from vla_dist.robot.spool_file import close_database, open_database, own_folder, spool_id_of

WhenFull = Literal["refuse", "drop_oldest"]
_REMEMBERED_EPISODES = 2000
"""Rows of episodes that are done; a few hundred bytes each."""
_FORGET_EVERY_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SpoolConfig:
    """Bounds of a spool."""

    max_bytes: int = 8 << 30
    """Of segments that the server does not have yet. The file is a few percent larger."""
    when_full: WhenFull = "refuse"
    """``refuse``: no new episode begins until there is room; nothing recorded is lost. ``drop_oldest``: the oldest
    closed episodes go, whole, and are counted and named; for robots that may not stop."""
    reserve_bytes: int = 64 << 20
    """Below ``max_bytes``: a new episode begins only with this much left, so that a running one can end. Also left free
    on the disk for others."""
    retain_s: float = 30.0
    """What the server has is kept for so long after an episode is done: a server whose machine loses power may forget
    its last second, and asks for it again."""

    def __post_init__(self) -> None:
        if not 0 <= self.reserve_bytes < self.max_bytes:
            raise ConfigError(f"reserve_bytes {self.reserve_bytes} must be within 0..max_bytes {self.max_bytes}")
        if self.when_full not in ("refuse", "drop_oldest"):
            raise ConfigError(f"when_full {self.when_full!r} must be refuse or drop_oldest")
        if self.retain_s < 0:
            raise ConfigError(f"retain_s {self.retain_s} must not be negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpooledSegment:
    """One segment that is to be sent."""

    episode_id: str
    segment_index: int
    request: bytes
    """A serialised ``UploadRequest``."""

    @property
    def key(self) -> SegmentKey:
        return self.episode_id, self.segment_index


class Spool:
    """One robot's; threads may share it, processes may not.

    Blocking: each call that writes returns when the disk has it.
    """

    def __init__(self, folder: Path, config: SpoolConfig | None = None) -> None:
        """Open or create the spool. Episodes that an earlier life left open are closed as partial.

        Raises:
            ResourceMissing: the folder cannot be written, or another process uses it.
        """
        self.folder = Path(folder)
        self.config = config or SpoolConfig()
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._forget_at = 0.0
        self._owner = own_folder(self.folder)
        try:
            self._database = open_database(self.folder)
            self.spool_id = spool_id_of(self._database)
            self.recovered = self._close_open("the recorder ended before the episode did")
        except BaseException:
            self._owner.close()
            raise

    def put(self, segment: Segment, *, packed: PackedImages | None = None, record: EpisodeRecord | None = None) -> None:
        """Take over the next segment of an episode; putting one again does nothing.

        Args:
            segment: the last one must come with ``record``; its images are left out where ``packed`` is given.
            packed: its frames, packed.
            record: closes the episode.

        Raises:
            DataError: not the next segment of its episode, or a last one without its record.
            ResourceMissing: no room; the episode stays open.
        """
        if segment.is_last != (record is not None):
            raise DataError(
                f"segment {segment.episode_id}/{segment.segment_index} has is_last {segment.is_last} and "
                f"{'a' if record else 'no'} record; the last segment, and only it, comes with one"
            )
        payload = upload_request(segment, packed)
        with self._changed, self._written("put"):
            count = self._database.execute(
                "SELECT num_segments, state FROM episodes WHERE episode_id = ?", (segment.episode_id,)
            ).fetchone() or (0, "open")
            if segment.segment_index < count[0]:
                return
            if segment.segment_index > count[0] or count[1] != "open":
                raise DataError(
                    f"segment {segment.episode_id}/{segment.segment_index} is not the next one: the spool holds "
                    f"{count[0]} of this {count[1]} episode"
                )
            self._make_room(len(payload))
            self._database.execute(
                "INSERT OR IGNORE INTO episodes (episode_id, state) VALUES (?, 'open')", (segment.episode_id,)
            )
            self._database.execute(
                "INSERT INTO segments (episode_id, segment_index, payload, checksum, num_bytes, num_steps) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (
                    segment.episode_id,
                    segment.segment_index,
                    payload,
                    zlib.crc32(payload),
                    len(payload),
                    segment.length,
                ),
            )
            self._database.execute(
                "UPDATE episodes SET num_segments = num_segments + 1 WHERE episode_id = ?", (segment.episode_id,)
            )
            if record is not None:
                self._close(record)
            self._changed.notify_all()

    def close_partial(self, record: EpisodeRecord) -> bool:
        """End an open episode with the segments it has; False where it has none. ``record.partial`` says why."""
        with self._changed, self._written("close"):
            row = self._database.execute(
                "SELECT num_segments FROM episodes WHERE episode_id = ? AND state = 'open'", (record.episode_id,)
            ).fetchone()
            if row is None or not row[0]:
                return False
            self._close(replace(record, num_segments=row[0]))
            self._changed.notify_all()
            return True

    def steps_of(self, episode_id: str) -> int:
        """Steps of an episode that are on the disk."""
        with self._lock, self._written("read"):
            query = "SELECT coalesce(sum(num_steps), 0) FROM segments WHERE episode_id = ?"
            return self._database.execute(query, (episode_id,)).fetchone()[0]

    def abandon(self, episode_id: str) -> None:
        """Forget an open episode of which nothing was sent; one of which something was is closed as partial."""
        with self._changed, self._written("abandon"):
            sent = self._database.execute(
                "SELECT 1 FROM segments WHERE episode_id = ? AND acknowledged", (episode_id,)
            ).fetchone()
            if sent is not None:
                self._recover(episode_id, "abandoned")
                return
            self._database.execute("DELETE FROM episodes WHERE episode_id = ? AND state = 'open'", (episode_id,))
            self._database.execute(
                "DELETE FROM segments WHERE episode_id = ? AND episode_id NOT IN (SELECT episode_id FROM episodes)",
                (episode_id,),
            )

    def pending(self, *, exclude: Sequence[SegmentKey] = (), limit: int = 8) -> list[SpooledSegment]:
        """Those to send next, oldest episode first, in order."""
        skipped = set(exclude)
        with self._lock, self._written("read"):
            rows = self._database.execute(
                "SELECT s.episode_id, s.segment_index, s.number FROM segments s JOIN episodes e USING (episode_id) "
                "WHERE s.acknowledged = 0 AND (e.state = 'closed' OR s.segment_index < e.num_segments - 1) "
                "ORDER BY s.number LIMIT ?",
                (limit + len(skipped),),
            ).fetchall()
            chosen = [row for row in rows if (row[0], row[1]) not in skipped][:limit]
            return [self._load(*row) for row in chosen]

    def wait_for_pending(self, timeout_s: float) -> None:
        """Until something was put or closed, or ``timeout_s`` are over."""
        with self._changed:
            self._changed.wait(timeout_s)

    def settle(self, ack: Ack) -> None:
        """Note what became of a segment: acknowledged ones free their room, and a whole episode is done.

        A refused segment keeps its bytes aside in ``refused``, and the rest of its episode goes on.
        """
        if ack.status == "retry":
            return
        with self._changed, self._written("settle"):
            if ack.status == "quarantined":
                self._set_aside(ack)
            self._database.execute(
                "UPDATE segments SET acknowledged = 1, payload = CASE WHEN ? THEN payload ELSE NULL END "
                "WHERE episode_id = ? AND segment_index = ?",
                (self.config.retain_s > 0 and ack.status != "quarantined", *ack.key),
            )
            self._database.execute(
                "UPDATE episodes SET state = 'done', reason = reason || ?, closed_unix_s = ? WHERE episode_id = ? "
                "AND state = 'closed' AND NOT EXISTS (SELECT 1 FROM segments s WHERE s.episode_id = ? "
                "AND NOT s.acknowledged)",
                (ack.reason, time.time(), ack.episode_id, ack.episode_id),
            )
            if time.monotonic() >= self._forget_at:
                self._forget_at = time.monotonic() + _FORGET_EVERY_S
                self._forget_done()
            self._changed.notify_all()

    def retained(self) -> list[str]:
        """Episodes that the server has and this spool could still send again."""
        with self._lock, self._written("read"):
            return [
                row[0]
                for row in self._database.execute(
                    "SELECT e.episode_id FROM episodes e WHERE e.state = 'done' AND EXISTS (SELECT 1 FROM segments s "
                    "WHERE s.episode_id = e.episode_id) AND NOT EXISTS (SELECT 1 FROM segments s WHERE "
                    "s.episode_id = e.episode_id AND s.payload IS NULL)"
                )
            ]

    def send_again(self, episode_ids: Sequence[str]) -> None:
        """The server lacks these retained episodes after all."""
        with self._changed, self._written("send again"):
            for episode_id in set(episode_ids) & set(self.retained()):
                self._database.execute("UPDATE segments SET acknowledged = 0 WHERE episode_id = ?", (episode_id,))
                self._database.execute("UPDATE episodes SET state = 'closed' WHERE episode_id = ?", (episode_id,))
            self._changed.notify_all()

    def require_room(self) -> None:
        """Raise ResourceMissing where a new episode should not begin."""
        with self._lock:
            waiting = self._waiting_bytes()
            if self.config.when_full == "refuse" and waiting + self.config.reserve_bytes > self.config.max_bytes:
                raise ResourceMissing(
                    f"the spool in {self.folder} holds {waiting:,} of at most {self.config.max_bytes:,} bytes that the "
                    "server has not taken; no new episode begins until it has, so check the network and the server"
                )
            free = shutil.disk_usage(self.folder).free
            if free < self.config.reserve_bytes:
                raise ResourceMissing(
                    f"the disk of the spool in {self.folder} has {free:,} bytes left, expected at least "
                    f"{self.config.reserve_bytes:,}; free some room, nothing recorded is lost"
                )

    def metrics(self) -> Metrics:
        """Counts of now; ``dropped_episodes`` of this spool's whole life."""
        with self._lock, self._written("read"):
            states = dict(self._database.execute("SELECT state, count(*) FROM episodes GROUP BY state").fetchall())
            segments = self._database.execute("SELECT count(*) FROM segments WHERE acknowledged = 0").fetchone()[0]
            dropped = self._database.execute("SELECT value FROM facts WHERE name = 'dropped'").fetchone()
            return {
                "open_episodes": states.get("open", 0),
                "closed_episodes": states.get("closed", 0),
                "waiting_segments": segments,
                "waiting_bytes": self._waiting_bytes(),
                "dropped_episodes": int(dropped[0]) if dropped else 0,
            }

    def close(self) -> None:
        """Nothing is lost by it; a second time does nothing."""
        with self._lock:
            if not self._owner.closed:
                close_database(self._database)
                self._owner.close()

    def _close(self, record: EpisodeRecord) -> None:
        self._database.execute(
            "UPDATE episodes SET state = 'closed', record = ?, closed_unix_s = ? WHERE episode_id = ?",
            (encode_episode(record).SerializeToString(), time.time(), record.episode_id),
        )

    def _close_open(self, reason: str) -> list[str]:
        with self._lock, self._written("recover"):
            rows = self._database.execute("SELECT episode_id FROM episodes WHERE state = 'open'").fetchall()
            for (episode_id,) in rows:
                self._recover(episode_id, reason)
            self._database.execute("DELETE FROM segments WHERE episode_id NOT IN (SELECT episode_id FROM episodes)")
            return [episode_id for (episode_id,) in rows]

    def _recover(self, episode_id: str, reason: str) -> None:
        """The record of an episode whose recorder is gone, from its segments."""
        rows = self._database.execute(
            "SELECT payload, num_steps FROM segments WHERE episode_id = ? ORDER BY segment_index", (episode_id,)
        ).fetchall()
        if not rows or rows[-1][0] is None:
            self._database.execute("DELETE FROM episodes WHERE episode_id = ?", (episode_id,))
            return
        last = fleet_pb2.UploadRequest.FromString(rows[-1][0]).segment
        record = fleet_pb2.EpisodeRecord(
            episode_id=episode_id,
            robot_id=last.robot_id,
            task=last.task,
            source=last.source,
            num_steps=sum(num_steps for _, num_steps in rows),
            num_segments=len(rows),
            partial=reason,
        )
        self._close(decode_episode(record))

    def _load(self, episode_id: str, segment_index: int, number: int) -> SpooledSegment:
        payload, num_segments, record = self._database.execute(
            "SELECT s.payload, e.num_segments, e.record FROM segments s JOIN episodes e USING (episode_id) "
            "WHERE s.number = ?",
            (number,),
        ).fetchone()
        if record is not None and segment_index == num_segments - 1:
            # Serialised messages merge by concatenation: the big part is never parsed again.
            episode = fleet_pb2.EpisodeRecord.FromString(record)
            end = types_pb2.Segment(is_last=True, success=episode.success)
            payload += fleet_pb2.UploadRequest(segment=end, episode=episode).SerializeToString()
        return SpooledSegment(episode_id=episode_id, segment_index=segment_index, request=payload)

    def _waiting_bytes(self) -> int:
        row = self._database.execute("SELECT sum(num_bytes) FROM segments WHERE acknowledged = 0").fetchone()
        return row[0] or 0

    def _make_room(self, num_bytes: int) -> None:
        while self._waiting_bytes() + num_bytes > self.config.max_bytes:
            oldest = self._database.execute(
                "SELECT episode_id FROM episodes WHERE state = 'closed' ORDER BY number LIMIT 1"
            ).fetchone()
            if self.config.when_full == "refuse" or oldest is None:
                raise ResourceMissing(
                    f"the spool in {self.folder} is full: {self._waiting_bytes():,} of {self.config.max_bytes:,} bytes "
                    "wait for the server. The episode ends here; raise max_bytes or bring the network back"
                )
            self._drop(oldest[0])

    def _drop(self, episode_id: str) -> None:
        self._database.execute("DELETE FROM segments WHERE episode_id = ?", (episode_id,))
        self._database.execute("DELETE FROM episodes WHERE episode_id = ?", (episode_id,))
        self._database.execute(
            "INSERT INTO facts VALUES ('dropped', '1') "
            "ON CONFLICT (name) DO UPDATE SET value = CAST(CAST(value AS INTEGER) + 1 AS TEXT)"
        )
        with open(self.folder / "dropped.log", "a") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {episode_id} spool full\n")

    def _forget_done(self) -> None:
        until = time.time() - self.config.retain_s
        self._database.execute(
            "DELETE FROM segments WHERE episode_id IN "
            "(SELECT episode_id FROM episodes WHERE state = 'done' AND closed_unix_s <= ?)",
            (until,),
        )
        self._database.execute(
            "DELETE FROM episodes WHERE state = 'done' AND number < (SELECT max(number) FROM episodes) - ? "
            "AND episode_id NOT IN (SELECT episode_id FROM segments)",
            (_REMEMBERED_EPISODES,),
        )

    def _set_aside(self, ack: Ack) -> None:
        row = self._database.execute(
            "SELECT number FROM segments WHERE episode_id = ? AND segment_index = ? AND payload IS NOT NULL", ack.key
        ).fetchone()
        if row is None:
            return
        folder = self.folder / "refused"
        folder.mkdir(exist_ok=True)
        name = f"{ack.episode_id.replace('/', '_')}-{ack.segment_index}"
        (folder / f"{name}.upload").write_bytes(self._load(*ack.key, row[0]).request)
        (folder / f"{name}.reason").write_text(ack.reason)

    @contextmanager
    def _written(self, verb: str) -> Iterator[None]:
        """One transaction; what SQLite raises in this package's words."""
        try:
            if self._database.in_transaction:
                yield
            else:
                with self._database:
                    yield
        except (sqlite3.Error, OSError) as error:
            if isinstance(error, ResourceMissing):
                raise
            raise ResourceMissing(
                f"the spool in {self.folder} could not {verb} ({error}); check room and health of the disk. What was "
                "put before is kept"
            ) from error
