"""Where an archive's files lie: a folder on any file system that pyarrow knows, in which a file is whole or absent."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from vla_dist.core.errors import ConfigError, NotFound, ResourceMissing, Unreachable
from vla_dist.replay.link import address_of

PART_SUFFIX = ".parquet"


class ArchiveFolder:
    """One folder; threads may share it."""

    def __init__(self, filesystem: fs.FileSystem, path: str, *, name: str | None = None) -> None:
        """
        Args:
            filesystem: of pyarrow.
            path: on it.
            name: what messages call it; None: ``path``.
        """
        self._filesystem = filesystem
        self._path = path.rstrip("/") or "/"
        self.name = name or path

    @classmethod
    def at(cls, location: "str | Path | ArchiveFolder") -> "ArchiveFolder":
        """From a path, or a URI that ``pyarrow.fs.FileSystem.from_uri`` takes: file, s3, gs, hdfs, ...

        Raises:
            ConfigError: a URI of a kind that pyarrow lacks.
            ResourceMissing: a library that this kind needs is not installed.
        """
        if isinstance(location, ArchiveFolder):
            return location
        text = str(location)
        if "://" not in text:
            return cls(fs.LocalFileSystem(), str(Path(text).expanduser().resolve()), name=text)
        kind, _, rest = text.partition("://")
        shown = f"{kind}://{address_of(rest)}"
        try:
            filesystem, path = fs.FileSystem.from_uri(text)
        except pa.ArrowInvalid as error:
            raise ConfigError(
                f"archive {shown!r} must be a path or a URI such as file:///..., s3://bucket/..., gs://bucket/... or "
                f"hdfs://host/...: {_first_line(error)}"
            ) from error
        except OSError as error:
            raise ResourceMissing(
                f"archive {shown!r} cannot be opened: {_first_line(error)}; install what this kind of URI needs"
            ) from error
        return cls(filesystem, path, name=shown)

    def create(self) -> None:
        """Make the folder where it is missing. Raises Unreachable."""
        with self._reported("made"):
            self._filesystem.create_dir(self._path, recursive=True)

    def part_names(self) -> list[str]:
        """Of the files of episodes, sorted; temporary and other files are passed over.

        Raises:
            NotFound: no such folder.
            Unreachable: no answer.
        """
        with self._reported("listed"):
            if self._filesystem.get_file_info(self._path).type != fs.FileType.Directory:
                raise NotFound(f"no archive at {self.name!r}: that is no folder; is the path right?")
            found = self._filesystem.get_file_info(fs.FileSelector(self._path, recursive=False))
        names = [one.base_name for one in found if one.type == fs.FileType.File]
        return sorted(name for name in names if name.endswith(PART_SUFFIX) and not name.startswith((".", "_")))

    def has(self, name: str) -> bool:
        with self._reported("read"):
            return self._filesystem.get_file_info(self._path_of(name)).type == fs.FileType.File

    def open(self, name: str) -> pa.NativeFile:
        """For reading at any place.

        Raises:
            NotFound: no such file.
            Unreachable: no answer.
        """
        with self._reported("read"):
            try:
                return self._filesystem.open_input_file(self._path_of(name))
            except FileNotFoundError as error:
                raise NotFound(f"{self.name!r} has no file {name!r}; was it removed meanwhile?") from error

    def require_readable(self, name: str) -> None:
        """Raise Unreachable where the bytes of a file cannot be had: what cannot be parsed may just not have come."""
        with self._reported("read"), self._filesystem.open_input_stream(self._path_of(name)) as stream:
            while stream.read(1 << 20):
                pass

    def put(self, name: str, data: pa.Buffer | bytes) -> None:
        """Write a whole file, over an earlier one of this name; durable when this returns.

        Raises:
            Unreachable: it could not be written; whatever has the name then is whole, or was there before. An object
                store may keep a part of it that ``PartReader`` refuses.
        """
        with self._reported("written"):
            if isinstance(self._filesystem, fs.LocalFileSystem):
                _write_durably(Path(self._path_of(name)), data)
            else:
                with self._filesystem.open_output_stream(self._path_of(name)) as stream:
                    stream.write(data)

    def _path_of(self, name: str) -> str:
        return f"{self._path}/{name}"

    @contextlib.contextmanager
    def _reported(self, done: str) -> Iterator[None]:
        try:
            yield
        except (NotFound, Unreachable):
            raise
        except OSError as error:
            raise Unreachable(
                f"archive {self.name!r} could not be {done} ({_first_line(error)}); are there room and permission, and "
                "is the store up?"
            ) from error


def _write_durably(path: Path, data: pa.Buffer | bytes) -> None:
    """Write new, sync, rename, sync the folder: a reader or a crash meets the whole file or none."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
