"""The Redis of a campaign, started again whenever it dies."""

import logging
import threading
from pathlib import Path

from vla_dist.core.errors import ResourceMissing, Unreachable
from vla_dist.replay.server import EmbeddedServer

_log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.2


class RedisKeeper:
    """An embedded server under one address for as long as the block runs; it lost nothing that it acknowledged."""

    def __init__(self, folder: Path) -> None:
        """Raises ResourceMissing, Unreachable: see ``EmbeddedServer``."""
        self._folder = folder
        self._server = EmbeddedServer(folder)
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

    def _watch(self) -> None:
        while not self._closed.wait(_LOOK_EVERY_S):
            if self._server.alive:
                continue
            self.deaths += 1
            _log.warning("Redis died and is started again (%d)", self.deaths)
            try:
                # A dead server's threads end by themselves; its directory is free.
                self._server.close()
                self._server = EmbeddedServer(self._folder)
            except (ResourceMissing, Unreachable) as error:
                _log.error("Redis could not be started again: %s", error)
