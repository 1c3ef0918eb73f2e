"""The SQLite file under a spool: opened whole, or rebuilt from what can be read of it."""

import fcntl
import logging
import sqlite3
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from vla_dist.core.errors import ResourceMissing

_log = logging.getLogger(__name__)

FILE = "spool.sqlite3"
DAMAGED = "damaged"
_SUFFIXES = ("", "-wal", "-shm")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS episodes (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    episode_id TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL,
    record BLOB,
    num_segments INTEGER NOT NULL DEFAULT 0,
    reason TEXT NOT NULL DEFAULT '',
    closed_unix_s REAL NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS segments (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    episode_id TEXT NOT NULL,
    segment_index INTEGER NOT NULL,
    payload BLOB,
    checksum INTEGER NOT NULL,
    num_bytes INTEGER NOT NULL,
    num_steps INTEGER NOT NULL,
    acknowledged INTEGER NOT NULL DEFAULT 0,
    UNIQUE (episode_id, segment_index)
);
CREATE INDEX IF NOT EXISTS waiting ON segments (number, num_bytes) WHERE acknowledged = 0;
"""
_EPISODE = "episode_id, state, record, num_segments, reason, closed_unix_s"
_SEGMENT = "episode_id, segment_index, payload, checksum, num_bytes, num_steps, acknowledged"


def own_folder(folder: Path) -> TextIO:
    """Hold the folder for this process until the file is closed.

    Raises:
        ResourceMissing: it cannot be written, or another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        owner = open(folder / "owner.lock", "w")  # noqa: SIM115 - held until the spool is closed
    except OSError as error:
        raise ResourceMissing(f"the spool in {folder} cannot be written ({error}); give another folder") from error
    try:
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner.close()
        raise ResourceMissing(
            f"the spool in {folder} is used by another process; give each robot a spool of its own"
        ) from error
    return owner


def open_database(folder: Path) -> sqlite3.Connection:
    """The database of a spool, created where it is missing. Whatever it holds is whole.

    A file that was not closed in order is read once from end to end. Where it is damaged, it is moved aside into a
    folder ``damaged-<time>`` and every row that can still be read and fits its checksum goes into a new one.

    Raises:
        ResourceMissing: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE
        try:
            connection = _connect(path)
            if not _was_closed(connection):
                _require_whole(connection)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError) and "full" in str(error):
                raise
            _log.error("the spool in %s is damaged (%s); what can be read of it is kept", folder, str(error))
            connection = _rebuild(folder)
        _mark(connection, closed=False)
        return connection
    except (OSError, sqlite3.OperationalError) as error:
        raise ResourceMissing(
            f"the spool in {folder} cannot be opened ({error}); check permissions and room on the disk"
        ) from error


def close_database(connection: sqlite3.Connection) -> None:
    """Say that it was closed in order, and close it."""
    _mark(connection, closed=True)
    connection.close()


def spool_id_of(connection: sqlite3.Connection) -> str:
    """A random identity that lives as long as the file."""
    with connection:
        connection.execute("INSERT OR IGNORE INTO facts VALUES ('spool_id', ?)", (uuid.uuid4().hex,))
    return connection.execute("SELECT value FROM facts WHERE name = 'spool_id'").fetchone()[0]


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, check_same_thread=False, timeout=5.0)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        # A commit is on the disk when it returns: a power loss takes nothing that was acknowledged to the recorder.
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA journal_size_limit = {16 << 20}")
        connection.executescript(_SCHEMA)
    except sqlite3.DatabaseError:
        connection.close()
        raise
    return connection


def _mark(connection: sqlite3.Connection, *, closed: bool) -> None:
    with connection:
        connection.execute("INSERT OR REPLACE INTO facts VALUES ('closed', ?)", (str(int(closed)),))


def _was_closed(connection: sqlite3.Connection) -> bool:
    row = connection.execute("SELECT value FROM facts WHERE name = 'closed'").fetchone()
    return row is not None and row[0] == "1"


def _require_whole(connection: sqlite3.Connection) -> None:
    try:
        known = {row[0] for row in connection.execute("SELECT episode_id FROM episodes")}
        for row in connection.execute(f"SELECT {_SEGMENT} FROM segments"):
            if not _fits(row) or row[0] not in known:
                raise sqlite3.DatabaseError(f"segment {row[0]}/{row[1]} differs from its checksum")
        problem = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if problem != "ok":
            raise sqlite3.DatabaseError(problem)
    except sqlite3.DatabaseError:
        connection.close()
        raise


def _fits(row: tuple) -> bool:
    payload, checksum, num_bytes, acknowledged = row[2], row[3], row[4], row[6]
    if payload is None:
        return bool(acknowledged)
    return len(payload) == num_bytes and zlib.crc32(payload) == checksum


def _rebuild(folder: Path) -> sqlite3.Connection:
    aside = folder / f"{DAMAGED}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    aside.mkdir()
    for suffix in _SUFFIXES:
        if (folder / f"{FILE}{suffix}").exists():
            (folder / f"{FILE}{suffix}").rename(aside / f"{FILE}{suffix}")
    episodes = {row[0]: row for row in _readable(aside, "episodes", _EPISODE) if row[1] in ("open", "closed", "done")}
    segments = [row for row in _readable(aside, "segments", _SEGMENT) if _fits(row)]
    connection = _connect(folder / FILE)
    with connection:
        for row in _repaired(episodes, segments):
            connection.execute(f"INSERT OR IGNORE INTO episodes ({_EPISODE}) VALUES (?, ?, ?, ?, ?, ?)", row)
        kept = {row[0]: row[3] for row in connection.execute(f"SELECT {_EPISODE} FROM episodes")}
        for row in segments:
            if row[1] < kept.get(row[0], 0):
                connection.execute(f"INSERT OR IGNORE INTO segments ({_SEGMENT}) VALUES (?, ?, ?, ?, ?, ?, ?)", row)
    _log.error("kept %d episodes of the damaged spool; the file itself lies in %s", len(kept), aside)
    return connection


def _repaired(episodes: dict[str, tuple], segments: list[tuple]) -> Iterator[tuple]:
    """The episodes as they are to go on: one with a gap ends before it, as if the power had failed there."""
    indices: dict[str, set[int]] = {}
    for row in segments:
        indices.setdefault(row[0], set()).add(row[1])
    for episode_id, row in episodes.items():
        _, state, _, num_segments, reason, closed_unix_s = row
        found = indices.get(episode_id, set())
        if state == "done" or found.issuperset(range(num_segments)):
            yield row
            continue
        whole = next(index for index in range(num_segments + 1) if index not in found)
        if whole:
            yield (episode_id, "open", None, whole, reason, closed_unix_s)
    for episode_id, found in indices.items():
        if episode_id not in episodes and 0 in found:
            whole = next(index for index in range(len(found) + 1) if index not in found)
            yield (episode_id, "open", None, whole, "", 0.0)


def _readable(folder: Path, table: str, columns: str) -> Iterator[tuple]:
    """Every row that SQLite can still reach, one at a time: a lost page takes only the rows on it."""
    connection = sqlite3.connect(folder / FILE, timeout=5.0)
    try:
        # With it SQLite opens a file that is shorter than its header says.
        connection.execute("PRAGMA writable_schema = ON")
        last = _last_number(connection, table)
        for number in range(1, last + 1):
            try:
                row = connection.execute(f"SELECT {columns} FROM {table} WHERE number = ?", (number,)).fetchone()
            except sqlite3.DatabaseError:
                continue
            if row is not None:
                yield row
    except sqlite3.DatabaseError as error:
        _log.error("nothing of table %s can be read: %s", table, str(error))
    finally:
        connection.close()


def _last_number(connection: sqlite3.Connection, table: str) -> int:
    for query in (f"SELECT max(number) FROM {table}", f"SELECT seq FROM sqlite_sequence WHERE name = '{table}'"):
        try:
            row = connection.execute(query).fetchone()
            if row is not None and row[0] is not None:
                return int(row[0])
        except sqlite3.DatabaseError:
            continue
    return 0
