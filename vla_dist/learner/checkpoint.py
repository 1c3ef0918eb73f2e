"""Checkpoints on disk: a directory each, written whole or not at all, checked when read, and never a pickle.

``tensors.safetensors`` holds every tensor, ``state.json`` everything else and the hash of both.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vla_dist.core.errors import ConfigError, IntegrityError, NotFound

_TENSORS = "tensors.safetensors"
_STATE = "state.json"
_PREFIX = "update-"


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
        target = self._root / f"{_PREFIX}{checkpoint.updates:010d}"
        partial = Path(tempfile.mkdtemp(prefix=".writing-", dir=self._root))
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


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sha256_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
