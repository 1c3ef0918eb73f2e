"""What a server says of its memory."""

import re
from dataclasses import dataclass
from typing import Self

from vla_dist.replay.wire import Command

MEMORY_QUESTION: Command = ("INFO", "memory", "errorstats")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerMemory:
    """Of the whole server, all its buffers included."""

    used_bytes: int
    limit_bytes: int
    """0: none."""
    num_refused: int
    """Commands refused for lack of memory since the server started; their writers waited and tried again."""

    @classmethod
    def of(cls, info: bytes) -> Self:
        """From the answer to ``MEMORY_QUESTION``."""
        fields = dict(line.split(":", 1) for line in info.decode().split("\r\n") if ":" in line)
        refused = re.fullmatch(r"count=(\d+).*", fields.get("errorstat_OOM", ""))
        return cls(
            used_bytes=int(fields["used_memory"]),
            limit_bytes=int(fields["maxmemory"]),
            num_refused=int(refused[1]) if refused else 0,
        )
