"""An embedded Redis, started again whenever it dies."""

import logging
import threading
from pathlib import Path

from vla_dist.core.errors import ResourceMissing, Unreachable
from vla_dist.replay.server import EmbeddedServer

_log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.2


class RedisKeeper:
    """An embedded server under one address until ``close``; with its log it lost nothing that it acknowledged."""

    def __init__(self, folder: Path, *, append_only: bool = True, max_memory_bytes: int | None = None) -> None:
        """Args: as of ``EmbeddedServer``; without ``append_only`` a server that died comes back empty.

        Raises:
            ResourceMissing, Unreachable: see ``EmbeddedServer``.
        """
        self.folder = folder
        self._append_only = append_only
        self._max_memory_bytes = max_memory_bytes
        self._server = self._start()
        self.url = self._server.url
        self.deaths = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="redis-keeper", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        return self._server.pid

    def close(self) -> None:
        """Save and stop."""
        self._closed.set()
        self._thread.join(60.0)
        self._server.close()

    def _start(self) -> EmbeddedServer:
        return EmbeddedServer(self.folder, append_only=self._append_only, max_memory_bytes=self._max_memory_bytes)

    def _watch(self) -> None:
        while not self._closed.wait(_LOOK_EVERY_S):
            if self._server.alive:
                continue
            self.deaths += 1
            _log.warning("Redis in %s died and is started again (%d)", self.folder, self.deaths)
            try:
                # A dead server's threads end by themselves; its directory is free.
                self._server.close()
                self._server = self._start()
            except (ResourceMissing, Unreachable) as error:
                _log.error("Redis in %s could not be started again: %s", self.folder, error)
