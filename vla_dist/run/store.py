"""The Redis of a run: its own embedded one, or the user's."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from vla_dist.replay.external import require_server
from vla_dist.replay.server import EmbeddedServer


@contextlib.contextmanager
def open_store(redis_url: str, directory: Path) -> Iterator[str]:
    """The URL of a store that answers, for as long as the block runs.

    Args:
        redis_url: the user's server; empty starts one whose files live in ``directory``.

    Raises:
        Unreachable: the given server does not answer.
        ResourceMissing: no server program is installed, or the directory is in use by another run.
    """
    if redis_url:
        require_server(redis_url)
        yield redis_url
        return
    with EmbeddedServer(directory) as server:
        yield server.url
