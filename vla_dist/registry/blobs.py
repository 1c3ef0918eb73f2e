"""Where tensors lie: byte strings under their SHA-256, written once and never overwritten."""

import contextlib
import hashlib
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from pyarrow.fs import FileSystem, FileType

from vla_dist.core.errors import ConfigError, DataError, IntegrityError, NotFound, Unreachable, VlaDistError
from vla_dist.registry.connection import connect, named_errors

_LARGEST_VALUE = 512 * 2**20 - 1
_SOCKET_TIMEOUT_S = 60.0


class BlobStore(Protocol):
    """Content-addressed bytes; every ``get`` returns what was ``put`` or raises."""

    def put(self, data: bytes, *, digest: str = "") -> str:
        """Store and return the SHA-256 in hexadecimal; storing the same bytes again changes nothing.

        Args:
            digest: that of ``data``, where the caller has computed it already.

        Raises:
            IntegrityError: other bytes already lie under that hash.
        """
        ...

    def get(self, digest: str) -> bytes:
        """Raises NotFound, or IntegrityError where the bytes no longer have that hash."""
        ...

    def delete(self, digest: str) -> bool:
        """Whether they were there. Only for whoever knows that no version needs them: see ``collection``."""
        ...


def open_blobs(location: str) -> "RedisBlobs | DirectoryBlobs | ArrowBlobs":
    """The store at a place: ``redis://``, ``rediss://`` or ``unix://``, a path, or any other URI that Arrow knows.

    Raises:
        ConfigError: Arrow knows no such place, or it cannot be written to.
    """
    scheme, separator, rest = location.partition("://")
    if not location:
        raise ConfigError("no place for blobs; give a path, redis://..., or s3://bucket/folder")
    if not separator or scheme == "file":
        return DirectoryBlobs(rest if separator else location)
    if scheme in ("redis", "rediss", "unix"):
        return RedisBlobs(location)
    try:
        filesystem, path = FileSystem.from_uri(location)
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"cannot keep blobs in {location} ({error}); give a path, redis://..., s3://bucket/folder or gs://..."
        ) from error
    return ArrowBlobs(filesystem, path)


class RedisBlobs:
    """Blobs in Redis: for models up to some hundred megabytes beside the replay."""

    def __init__(self, url: str) -> None:
        self._client = connect(url, socket_timeout_s=_SOCKET_TIMEOUT_S)

    def put(self, data: bytes, *, digest: str = "") -> str:
        if len(data) > _LARGEST_VALUE:
            raise DataError(f"{len(data)} bytes of tensors, Redis takes at most {_LARGEST_VALUE}; use DirectoryBlobs")
        digest = digest or hashlib.sha256(data).hexdigest()
        with named_errors():
            stored = self._client.set(_key(digest), data, nx=True)
        if not stored:
            self.get(digest)
        return digest

    def get(self, digest: str) -> bytes:
        with named_errors():
            data = self._client.get(_key(digest))
        if data is None:
            raise NotFound(_missing(digest, "Redis"))
        assert isinstance(data, bytes)
        return _verified(data, digest, "Redis")

    def delete(self, digest: str) -> bool:
        with named_errors():
            return bool(self._client.delete(_key(digest)))


class DirectoryBlobs:
    """Blobs as files of a directory, which may be a network file system that all machines mount."""

    def __init__(self, path: str | Path) -> None:
        """Raises ConfigError where ``path`` cannot be a directory."""
        self._path = Path(path)
        try:
            self._path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot keep blobs in {path} ({error}); give a directory you may write to") from error

    def put(self, data: bytes, *, digest: str = "") -> str:
        digest = digest or hashlib.sha256(data).hexdigest()
        target = self._file(digest)
        if target.exists():
            self.get(digest)
            return digest
        # Complete under another name first: a crash leaves the old state or the new one, never half a file.
        descriptor, temporary = tempfile.mkstemp(dir=self._path, prefix=".writing-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        directory = os.open(self._path, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        return digest

    def get(self, digest: str) -> bytes:
        try:
            data = self._file(digest).read_bytes()
        except FileNotFoundError:
            raise NotFound(_missing(digest, str(self._path))) from None
        return _verified(data, digest, str(self._path))

    def delete(self, digest: str) -> bool:
        try:
            self._file(digest).unlink()
        except FileNotFoundError:
            return False
        return True

    def _file(self, digest: str) -> Path:
        return self._path / f"{digest}.safetensors"


class ArrowBlobs:
    """Blobs as objects of any storage that ``pyarrow.fs`` knows: S3, Google Cloud Storage, HDFS."""

    def __init__(self, filesystem: FileSystem, path: str) -> None:
        self._filesystem = filesystem
        self._path = path.rstrip("/")

    def put(self, data: bytes, *, digest: str = "") -> str:
        digest = digest or hashlib.sha256(data).hexdigest()
        with _named_storage_errors(self._path):
            if self._is_there(digest):
                self.get(digest)
                return digest
            # Not every storage shows a file only once it is whole, but each renames one at once.
            partial = f"{self._path}/.writing-{uuid.uuid4().hex}"
            self._filesystem.create_dir(self._path, recursive=True)
            try:
                with self._filesystem.open_output_stream(partial) as stream:
                    stream.write(data)
                self._filesystem.move(partial, self._file(digest))
            except BaseException:
                with contextlib.suppress(OSError):
                    self._filesystem.delete_file(partial)
                raise
        return digest

    def get(self, digest: str) -> bytes:
        with _named_storage_errors(self._path):
            if not self._is_there(digest):
                raise NotFound(_missing(digest, self._path))
            with self._filesystem.open_input_stream(self._file(digest)) as stream:
                data = stream.read()
        return _verified(data, digest, self._path)

    def delete(self, digest: str) -> bool:
        with _named_storage_errors(self._path):
            if not self._is_there(digest):
                return False
            self._filesystem.delete_file(self._file(digest))
            return True

    def _is_there(self, digest: str) -> bool:
        return self._filesystem.get_file_info(self._file(digest)).type == FileType.File

    def _file(self, digest: str) -> str:
        return f"{self._path}/{digest}.safetensors"


@contextlib.contextmanager
def _named_storage_errors(place: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, VlaDistError):
            raise
        raise Unreachable(f"the storage {place} of blobs does not answer ({error}); check its address and keys") from (
            error
        )


def _key(digest: str) -> str:
    return f"{{registry}}:blob:{digest}"


def _missing(digest: str, place: str) -> str:
    return (
        f"no tensors {digest[:16]}... in {place}; give the blob store that this version was published to, or publish "
        "the version again from its checkpoint"
    )


def _verified(data: bytes, digest: str, place: str) -> bytes:
    actual = hashlib.sha256(data).hexdigest()
    if actual != digest:
        raise IntegrityError(
            f"tensors {digest[:16]}... in {place} now hash to {actual[:16]}...: damaged or tampered with. Delete them "
            "and publish the version again from its checkpoint"
        )
    return data
