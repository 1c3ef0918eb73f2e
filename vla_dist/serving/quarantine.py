"""Segments that can never be stored, kept for a person to look at: the message and the reason, side by side."""

import hashlib
import logging
import os
import threading
from pathlib import Path

from vla_dist.core.errors import ConfigError

_log = logging.getLogger(__name__)


class QuarantineFolder:
    """A bounded folder; the same bytes are kept once.

    ``<sha256>.segment`` is the protobuf ``vla_dist.v1.UploadRequest`` as it came, ``<sha256>.reason`` one sentence.
    When the folder is full, later ones are only logged: the first of a kind tells most.
    """

    def __init__(self, folder: Path, *, max_bytes: int = 256 * 2**20) -> None:
        if max_bytes < 1:
            raise ConfigError(f"max_bytes {max_bytes} must be at least 1")
        self.folder = folder
        self.max_bytes = max_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self._num_bytes = sum(path.stat().st_size for path in folder.iterdir())
        self._lock = threading.Lock()

    def keep(self, raw: bytes, *, reason: str) -> bool:
        """Whether the segment is in the folder now."""
        name = hashlib.sha256(raw).hexdigest()
        with self._lock:
            if (self.folder / f"{name}.segment").exists():
                return True
            if self._num_bytes + len(raw) > self.max_bytes:
                _log.warning(
                    "quarantine %s is full (%d bytes); dropped %d bytes", self.folder, self._num_bytes, len(raw)
                )
                return False
            self._num_bytes += len(raw)
            self._write(f"{name}.reason", reason.encode())
            self._write(f"{name}.segment", raw)
        return True

    def _write(self, name: str, data: bytes) -> None:
        """Write new, sync, rename: a file that has its name is whole."""
        partial = self.folder / f".{name}.partial"
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(self.folder / name)
