"""The Redis of a run: its own embedded one, or the user's."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vla_dist.replay.external import require_server
from vla_dist.replay.server import EmbeddedServer, half_of_memory
from vla_dist.run.config import RunConfig
from vla_dist.run.files import IMAGES, REDIS


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """Addresses, passwords included."""

    redis_url: str
    images_url: str | None
    """Where frames of cameras lie; None: beside everything else."""


@contextlib.contextmanager
def open_store(config: RunConfig, run_dir: Path) -> Iterator[Store]:
    """A store that answers, for as long as the block runs.

    What the user gave no server for is embedded, its files in ``run_dir``. Frames then lie on a server without a log:
    it saves them when it is stopped, and forgets them when it is killed.

    Raises:
        Unreachable: a given server does not answer.
        ResourceMissing: no server program is installed, or the folder is in use by another run.
    """
    replay = config.replay
    apart = bool(replay.images_redis_url or (config.env.cameras and not replay.redis_url))
    half = half_of_memory()
    with contextlib.ExitStack() as stack:

        def server_at(url: str, name: str, share: float, *, append_only: bool) -> str:
            if url:
                require_server(url)
                return url
            server = EmbeddedServer(run_dir / name, append_only=append_only, max_memory_bytes=int(share * half))
            return stack.enter_context(server).url

        redis_url = server_at(replay.redis_url, REDIS, 0.25 if apart else 1.0, append_only=True)
        images_url = server_at(replay.images_redis_url, IMAGES, 0.75, append_only=False) if apart else None
        yield Store(redis_url=redis_url, images_url=images_url)
