"""The Redis of a run: its own embedded one, or the user's."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vla_dist.core.errors import NotFound
from vla_dist.replay.external import require_server, split_urls
from vla_dist.replay.server import half_of_memory
from vla_dist.run.config import RunConfig
from vla_dist.run.files import IMAGES, REDIS
from vla_dist.run.head_store import STORE_FOLDER, find_store
from vla_dist.run.redis_keeper import RedisKeeper

STORE_VARIABLE = "VLA_DIST_REDIS_URL"
"""Environment of a cluster's head: the Redis of its runs, used where ``replay.redis_url`` is empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """Addresses, passwords included."""

    redis_url: str
    images_url: str | None
    """Where frames of cameras lie; None: beside everything else."""
    shard_urls: tuple[str, ...] = ()
    """Where the replay lies over several servers: all of them, ``redis_url`` first."""
    shard_images_urls: tuple[str, ...] = ()
    """And where its frames lie, shard by shard; empty: beside everything else."""
    keepers: tuple[RedisKeeper, ...] = field(default=(), repr=False, compare=False)
    """Of the servers that are embedded in this process."""

    @property
    def urls(self) -> tuple[str, ...]:
        """Of every server, each once."""
        alone = (self.redis_url, *((self.images_url,) if self.images_url else ()))
        return tuple(dict.fromkeys((*alone, *self.shard_urls, *self.shard_images_urls)))

    def notes(self) -> tuple[str, ...]:
        """One sentence for each embedded server that died."""
        return tuple(
            f"{keeper.folder.name} died and was started again ({keeper.deaths} so far)"
            for keeper in self.keepers
            if keeper.deaths
        )

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches all of it."""
        return any(url.startswith("unix:") for url in self.urls)


def existing_store_url(run_dir: Path) -> str:
    """Of a run that has no server of its own, on the head of a cluster: for whoever logs in there. Else empty."""
    if not (run_dir / REDIS).exists():
        with contextlib.suppress(NotFound):
            return find_store(Path.home() / STORE_FOLDER).replay_url
    return ""


@contextlib.contextmanager
def open_store(config: RunConfig, run_dir: Path, *, existing_url: str = "") -> Iterator[Store]:
    """A store that answers, for as long as the block runs.

    What neither the config nor the environment names a server for is embedded, its files in ``run_dir``, and started
    again when it dies. Frames then lie on a server without a log: it saves them when it is stopped, and forgets them
    when it is killed.

    Args:
        existing_url: of a server that a run of long ago lies on, where neither names one.

    Raises:
        Unreachable: a given server does not answer.
        ResourceMissing: no server program is installed, or the folder is in use by another run.
    """
    replay = config.replay
    urls = split_urls(replay.redis_url or os.environ.get(STORE_VARIABLE, "") or existing_url)
    images_urls = split_urls(replay.images_redis_url)
    for url in dict.fromkeys([*urls, *images_urls]):
        require_server(url)
    if len(urls) > 1:
        images_urls = images_urls * len(urls) if len(images_urls) == 1 else images_urls
        first = images_urls[0] if images_urls else None
        yield Store(redis_url=urls[0], images_url=first, shard_urls=urls, shard_images_urls=images_urls)
        return
    apart = bool(images_urls or (config.env.cameras and not urls))
    half = half_of_memory()
    with contextlib.ExitStack() as stack:
        keepers: list[RedisKeeper] = []

        def embed(name: str, share: float, *, append_only: bool) -> str:
            server = RedisKeeper(run_dir / name, append_only=append_only, max_memory_bytes=int(share * half))
            keepers.append(stack.enter_context(contextlib.closing(server)))
            return server.url

        redis_url = urls[0] if urls else embed(REDIS, 0.25 if apart else 1.0, append_only=True)
        images_url = None
        if apart:
            images_url = images_urls[0] if images_urls else embed(IMAGES, 0.75, append_only=False)
        yield Store(redis_url=redis_url, images_url=images_url, keepers=tuple(keepers))
