"""Names in Redis. Everything of a buffer lies under one hash tag, so it works on one node of a Redis Cluster."""

import base64
import functools
import hashlib


@functools.lru_cache(4096)
def episode_digest(episode_id: str) -> str:
    """16 characters that stand for an episode in the names of its payloads; 96 bits, so none is met twice."""
    raw = hashlib.blake2b(episode_id.encode(), digest_size=12).digest()
    return base64.urlsafe_b64encode(raw).decode()


class Keys:
    """The names of one buffer; see the head of ``functions.lua``."""

    def __init__(self, buffer: str, shard: int | None = None) -> None:
        """``shard``: of a buffer over several servers, which of its parts; None: all of it."""
        self.prefix = f"{{buffer:{buffer}}}:" if shard is None else f"{{buffer:{buffer}:{shard}}}:"
        self.state = self.prefix + "state"
        self.config = self.prefix + "config"
        self.live = self.prefix + "live"
        self.gone = self.prefix + "gone"
        self.by = self.prefix + "by"
        self.order = self.prefix + "order"
        self.archive_plan = self.prefix + "archive_plan"
        self.images_gone = self.prefix + "images_gone"
        self.fresh = self.prefix + "fresh"

    def row(self, digest: str, segment: int) -> str:
        return f"{self.prefix}row:{digest}:{segment}"

    def image(self, digest: str, segment: int, camera: int) -> str:
        return f"{self.prefix}image:{digest}:{segment}:{camera}"

    def of_table(self, kind: str, table: int) -> str:
        """``priorities``, ``draws``, ``used`` or ``events`` of a table."""
        return f"{self.prefix}{kind}:{table}"
