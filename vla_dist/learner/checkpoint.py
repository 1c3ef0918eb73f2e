"""Checkpoints on disk and on any storage: a directory each, whole or not there, checked when read, and never a pickle.

``tensors.safetensors`` holds every tensor, ``state.json`` everything else and the hash of both.
"""

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vla_dist.core.errors import ConfigError, IntegrityError, NotFound

_TENSORS = "tensors.safetensors"
_STATE = "state.json"
_PREFIX = "update-"
_PARTIAL = ".writing-"
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Checkpoint:
    """Everything that training needs to go on as if it had never stopped."""

    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]
    """Plain JSON; ``updates`` counts the optimiser's steps."""

    @property
    def updates(self) -> int:
        return int(self.state["updates"])


def write_checkpoint(checkpoint: Checkpoint, directory: Path) -> None:
    """Fill an existing empty directory and force it to the disk."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in checkpoint.tensors.items()}
    save_file(tensors, directory / _TENSORS)
    body = json.dumps(checkpoint.state, sort_keys=True)
    hashes = {"tensors": _sha256_of_file(directory / _TENSORS), "state": _sha256(body)}
    (directory / _STATE).write_text(json.dumps({"format": 1, "sha256": hashes, "state": body}), encoding="utf-8")
    for name in (_TENSORS, _STATE):
        _sync(directory / name)
    _sync(directory)


def read_checkpoint(directory: Path) -> Checkpoint:
    """Raises IntegrityError when a file is missing, cut or changed."""
    try:
        written = json.loads((directory / _STATE).read_text(encoding="utf-8"))
        hashes, body = written["sha256"], written["state"]
        if hashes["state"] != _sha256(body) or hashes["tensors"] != _sha256_of_file(directory / _TENSORS):
            raise IntegrityError(f"checkpoint {directory} differs from its hash; use an older one or start again")
        return Checkpoint(tensors=load_file(directory / _TENSORS), state=json.loads(body))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, IntegrityError):
            raise
        raise IntegrityError(
            f"checkpoint {directory} cannot be read ({error!r}); use an older one or start again"
        ) from error


def checkpoint_name(updates: int) -> str:
    """Never given twice, and sorted by updates: a run that went back writes some updates again."""
    return f"{_PREFIX}{updates:010d}-{uuid.uuid4().hex[:8]}"


def is_checkpoint_name(name: str) -> bool:
    return name.startswith(_PREFIX)


def updates_of(path: str) -> int:
    """Inverse of ``checkpoint_name``, for a whole path; 0 for another name."""
    digits = path.rpartition("/")[2].removeprefix(_PREFIX).partition("-")[0]
    return int(digits) if digits.isdigit() else 0


def upload_checkpoint(directory: Path, filesystem: FileSystem, path: str) -> None:
    """Copy what ``write_checkpoint`` wrote; under ``path`` it appears whole or not at all, or is refused when read.

    A training has one writer at a time, so what an earlier one was killed over is removed.

    Raises:
        OSError: the storage refused.
    """
    _remove_unfinished(filesystem, path.rpartition("/")[0])
    if not isinstance(filesystem, LocalFileSystem):
        # Stores of objects cannot rename a folder; without the hashes, sent last, it does not count as a checkpoint.
        filesystem.create_dir(path, recursive=True)
        for name in (_TENSORS, _STATE):
            _send(directory / name, filesystem, f"{path}/{name}")
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=target.parent))
    try:
        for name in (_TENSORS, _STATE):
            shutil.copyfile(directory / name, partial / name)
            _sync(partial / name)
        _sync(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _sync(target.parent)


def uploaded_checkpoints(filesystem: FileSystem, folder: str) -> list[str]:
    """Paths of the uploads in a folder, damaged ones too, latest first."""
    found = [info.base_name for info in filesystem.get_file_info(FileSelector(folder, allow_not_found=True))]
    return [f"{folder}/{name}" for name in sorted(filter(is_checkpoint_name, found), reverse=True)]


class CheckpointStore:
    """The last few checkpoints of one training run under one directory, with one writer."""

    def __init__(self, root: Path, *, keep: int = 3) -> None:
        if keep < 1:
            raise ConfigError(f"keep {keep} checkpoints: at least 1 is needed, 2 to survive a damaged one")
        self._root = root
        self._keep = keep
        root.mkdir(parents=True, exist_ok=True)

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write, then let the oldest go. A checkpoint of the same update is replaced."""
        _remove_unfinished(LocalFileSystem(), str(self._root))
        target = self._root / f"{_PREFIX}{checkpoint.updates:010d}"
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=self._root))
        try:
            write_checkpoint(checkpoint, partial)
            if target.exists():
                shutil.rmtree(target)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        _sync(self._root)
        for old in self.paths()[: -self._keep]:
            shutil.rmtree(old)
        return target

    def paths(self) -> list[Path]:
        """Oldest first."""
        return sorted(self._root.glob(f"{_PREFIX}*"))

    def load_newest(self) -> Checkpoint:
        """The newest whole checkpoint; damaged ones are passed over.

        Raises:
            NotFound: there is none at all.
            IntegrityError: every one is damaged.
        """
        damaged: list[str] = []
        for path in reversed(self.paths()):
            try:
                return read_checkpoint(path)
            except IntegrityError as error:
                damaged.append(str(error))
        if damaged:
            raise IntegrityError("; ".join(damaged))
        raise NotFound(f"no checkpoint under {self._root}; start without one")


def _remove_unfinished(filesystem: FileSystem, folder: str) -> None:
    for info in filesystem.get_file_info(FileSelector(folder, allow_not_found=True)):
        is_partial = info.base_name.startswith(_PARTIAL)
        if not is_partial and is_checkpoint_name(info.base_name):
            is_partial = filesystem.get_file_info(f"{info.path}/{_STATE}").type == FileType.NotFound
        if is_partial and info.type == FileType.Directory:
            filesystem.delete_dir(info.path)


def _send(file: Path, filesystem: FileSystem, path: str) -> None:
    with filesystem.open_output_stream(path) as stream, file.open("rb") as source:
        for block in iter(lambda: source.read(_BLOCK_BYTES), b""):
            stream.write(block)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sha256_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(_BLOCK_BYTES), b""):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
