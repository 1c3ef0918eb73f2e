"""Which buffers lie where, for those who did not make them."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

from vla_dist.core.errors import ConfigError, IntegrityError, NotFound
from vla_dist.replay.keys import Keys
from vla_dist.replay.link import RedisLink
from vla_dist.replay.table import RedisReplayTable

_FIRST_ANSWER_S = 3.0
_SCAN_PAGE = 5000
_SCAN_LIMIT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferPlace:
    """Where a buffer lies; a shard of one over several servers is called ``NAME:i``."""

    name: str
    url: str
    images_url: str | None

    def open(self) -> RedisReplayTable:
        """See ``open_buffer``."""
        return open_buffer(self.url, self.name, images_url=self.images_url)


def find_buffers(urls: Sequence[str], images_urls: Sequence[str], name: str = "") -> list[BufferPlace]:
    """All buffers on some servers, or the one of that name; of a single server nobody asks whether it has that.

    Args:
        urls: of the servers.
        images_urls: of the servers of their images, one for each, one for all, or none.
        name: empty for all of them.

    Raises:
        NotFound: none of that name; the message lists those there are.
        ConfigError, Unauthorised, Unreachable: as ``RedisLink.call``.
    """
    if len(images_urls) not in (0, 1, len(urls)):
        raise ConfigError(f"{len(images_urls)} servers of images for {len(urls)} servers, expected as many, or one")
    images = [*images_urls] * len(urls) if len(images_urls) == 1 else [*images_urls] or [None] * len(urls)
    if name and len(urls) == 1:
        return [BufferPlace(name=name, url=urls[0], images_url=images[0])]
    there: dict[str, BufferPlace] = {}
    for url, images_url in zip(urls, images, strict=True):
        for found in buffer_names(url):
            there.setdefault(found, BufferPlace(name=found, url=url, images_url=images_url))
    if name and name not in there:
        raise NotFound(f"no buffer {name!r}; there is {', '.join(there) or 'none at all'}. Is the URL right?")
    return [there[name]] if name else list(there.values())


def buffer_names(url: str) -> list[str]:
    """Names of the buffers on a server, sorted; what 10 s of looking through its keys finds.

    Raises:
        ConfigError, Unauthorised, Unreachable: as ``RedisLink.call``.
    """
    link, cursor, names = RedisLink(url), b"0", set()
    end = time.monotonic() + _SCAN_LIMIT_S
    try:
        while True:
            scan = ("SCAN", cursor, "MATCH", "{buffer:*}:config", "COUNT", _SCAN_PAGE)
            cursor, keys = link.call([scan], timeout_s=_FIRST_ANSWER_S)[0]
            names.update(key.decode()[len("{buffer:") : -len("}:config")] for key in keys)
            if cursor == b"0" or time.monotonic() > end:
                return sorted(names)
    finally:
        link.close()


def open_buffer(url: str, name: str, *, images_url: str | None = None) -> RedisReplayTable:
    """A client of a buffer that exists; unlike the class itself it never creates one.

    Raises:
        NotFound: no such buffer; the message names those there are.
        ConfigError: an ``images_url`` that is missing or too much.
        IntegrityError: it has lost its counters.
    """
    link, keys = RedisLink(url), Keys(name)
    try:
        identity, has_state = link.call(
            [("HGET", keys.config, "identity"), ("EXISTS", keys.state)], timeout_s=_FIRST_ANSWER_S
        )
    finally:
        link.close()
    if identity is None:
        there = ", ".join(buffer_names(url)) or "no buffer at all"
        raise NotFound(f"no buffer {name!r} in Redis at {link.address}; it has {there}")
    if not has_state:
        raise IntegrityError(
            f"buffer {name!r} in Redis at {link.address} has lost its counters (key {keys.state}); its episodes cannot "
            "be told apart any more: delete its keys and refill it from its archive"
        )
    fields = json.loads(identity)
    if fields["images_apart"] and images_url is None and fields["image_encodings"]:
        raise ConfigError(f"buffer {name!r} keeps its images on another server; give its URL as --images-redis-url")
    if not fields["images_apart"] and images_url is not None:
        raise ConfigError(f"buffer {name!r} keeps its images on its own server; leave --images-redis-url out")
    # Without cameras the second server holds nothing: any URL does.
    apart = (images_url or url) if fields["images_apart"] else None
    return RedisReplayTable.open(url, name, images_url=apart)
