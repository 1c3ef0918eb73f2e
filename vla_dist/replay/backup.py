"""Copies of an ``EmbeddedServer``'s data, taken while it works, and put back where none runs.

A server's log is a list of parts (its manifest): a base, then what was written since. A part that has a younger one is
never written again, and the youngest only grows, so that a copy of what it has at one moment is the data of that
moment; the server drops a last write that is not whole when it loads. A server that begins its log anew meanwhile has
another manifest afterwards, and the copy is made again.
"""

import fcntl
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from vla_dist import __version__
from vla_dist.core.errors import ConfigError, NotFound, ResourceMissing, WaitTimeout

_LOG, _MANIFEST = "appendonlydir", "appendonly.aof.manifest"
_PASSWORD, _LOCK, _NOTE = "client.password", "lock", "backup.json"
_ATTEMPTS = 5
_CHUNK_BYTES = 2**24


@dataclass(frozen=True, slots=True, kw_only=True)
class Backup:
    """What lies in a folder that ``back_up`` made."""

    taken_at: float
    """Unix time at which the copy was whole; it has everything that was acknowledged before it began."""
    source: str
    num_bytes: int
    version: str
    """Of vla-dist."""


def back_up(server_folder: Path, to: Path) -> Backup:
    """Copy the data of a server that runs, or of one that does not. The server notices nothing.

    Args:
        server_folder: of an ``EmbeddedServer`` with a log: ``redis`` in a run's folder, ``store/replay`` of a head.
        to: a folder that is not there yet. It holds the server's password, so only its owner may read it.

    Raises:
        NotFound: no server ever had its log there.
        ConfigError: ``to`` is there already.
        ResourceMissing: the copy could not be written.
        WaitTimeout: the server began its log anew again and again.
    """
    if not (server_folder / _LOG / _MANIFEST).exists():
        raise NotFound(
            f"{server_folder} has no log of a server; on a head it is ~/.vla-dist/store/replay, in the folder of a run "
            "it is 'redis'"
        )
    if to.exists():
        raise ConfigError(f"{to} is there already; name a new folder for each backup")
    partial = to.with_name(f".{to.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (partial / _LOG).mkdir(mode=0o700, parents=True)
        partial.chmod(0o700)
        num_bytes = _copy_log(server_folder / _LOG, partial / _LOG)
        _copy(server_folder / _PASSWORD, partial / _PASSWORD)
        backup = Backup(
            taken_at=time.time(), source=str(server_folder.resolve()), num_bytes=num_bytes, version=__version__
        )
        (partial / _NOTE).write_text(json.dumps(asdict(backup), indent=2))
        for folder in (partial / _LOG, partial):
            _sync_folder(folder)
        partial.rename(to)
        _sync_folder(to.parent)
    except OSError as error:
        raise ResourceMissing(
            f"the backup could not be written to {to} ({error}); is the disk full, or not yours?"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return backup


def read_backup(folder: Path) -> Backup:
    """Raises NotFound where ``back_up`` has not made the folder."""
    try:
        return Backup(**json.loads((folder / _NOTE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise NotFound(f"{folder} is not a whole backup: no {_NOTE} that can be read ({error})") from error


def restore(folder: Path, server_folder: Path) -> Backup:
    """Put a backup where the next server of ``server_folder`` finds it.

    Raises:
        NotFound: ``folder`` is no backup.
        ConfigError: ``server_folder`` has data already.
        ResourceMissing: a server runs there, or the copy could not be written.
    """
    backup = read_backup(folder)
    server_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(os.open(server_folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o600), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResourceMissing(
                f"a server runs on {server_folder}; stop it first (on a head: ray down, then wait three minutes)"
            ) from None
        if (server_folder / _LOG).exists():
            raise ConfigError(
                f"{server_folder} has data already; move {server_folder / _LOG} away if they may be replaced"
            )
        partial = server_folder / f".{_LOG}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(mode=0o700)
        try:
            for path in sorted((folder / _LOG).iterdir()):
                _copy(path, partial / path.name)
            _copy(folder / _PASSWORD, server_folder / _PASSWORD)
            _sync_folder(partial)
            partial.rename(server_folder / _LOG)
            _sync_folder(server_folder)
        except OSError as error:
            raise ResourceMissing(f"the backup could not be restored to {server_folder} ({error})") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return backup


def _copy_log(source: Path, to: Path) -> int:
    """Bytes of all parts of one state of the log."""
    for _ in range(_ATTEMPTS):
        manifest = (source / _MANIFEST).read_bytes()
        names = [line.split()[1] for line in manifest.decode().splitlines() if line.startswith("file ")]
        try:
            num_bytes = sum(_copy(source / name, to / name) for name in names)
        except FileNotFoundError:
            names = []
        if names and (source / _MANIFEST).read_bytes() == manifest:
            (to / _MANIFEST).write_bytes(manifest)
            return num_bytes
        for path in to.iterdir():
            path.unlink()
    raise WaitTimeout(f"the server on {source.parent} began its log anew {_ATTEMPTS} times meanwhile; try again")


def _copy(source: Path, to: Path) -> int:
    """Bytes of what the file has now; what is appended meanwhile stays behind."""
    with open(source, "rb") as reader, open(os.open(to, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as writer:
        size = left = os.fstat(reader.fileno()).st_size
        while left and (chunk := reader.read(min(left, _CHUNK_BYTES))):
            writer.write(chunk)
            left -= len(chunk)
        writer.flush()
        os.fsync(writer.fileno())
    return size - left


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
