"""A Redis or Valkey that somebody else runs."""

import re

from vla_dist.core.errors import ConfigError, Unauthorised
from vla_dist.replay.link import RedisLink, function_name
from vla_dist.replay.wire import Command, ReplyError

_BETWEEN_URLS = re.compile(r",\s*(?=(?:unix|rediss?)://)")
_OLDEST_REDIS, _OLDEST_VALKEY = 7, 8
_KEY = "{buffer:.permissions}:probe"
# Each command that the replay or one of its functions uses, in a form that leaves nothing behind.
_PROBES: tuple[Command, ...] = (
    ("EXISTS", _KEY),
    ("GET", _KEY),
    ("MGET", _KEY),
    ("GETRANGE", _KEY, 0, 0),
    ("STRLEN", _KEY),
    ("PTTL", _KEY),
    ("SET", _KEY, "", "XX"),
    ("MSETNX", _KEY, ""),
    ("GETDEL", _KEY),
    ("SETRANGE", _KEY, 0, ""),
    ("PERSIST", _KEY),
    ("DEL", _KEY),
    ("HSET", _KEY, "field", 1),
    ("HSETNX", _KEY, "field", 1),
    ("HGET", _KEY, "field"),
    ("HMGET", _KEY, "field"),
    ("HGETALL", _KEY),
    ("HLEN", _KEY),
    ("HSCAN", _KEY, 0),
    ("HINCRBY", _KEY, "field", 1),
    ("HDEL", _KEY, "field"),
    ("RPUSH", _KEY, "item"),
    ("LLEN", _KEY),
    ("LINDEX", _KEY, 0),
    ("LRANGE", _KEY, 0, 0),
    ("LREM", _KEY, 0, "none"),
    ("LPOP", _KEY),
    ("XADD", _KEY, "NOMKSTREAM", "1-0", "field", "value"),
    ("XRANGE", _KEY, "-", "+"),
    ("XREVRANGE", _KEY, "+", "-"),
    ("XDEL", _KEY, "1-0"),
    ("XGROUP", "CREATE", _KEY, "group", "0"),
    ("XREADGROUP", "GROUP", "group", "consumer", "STREAMS", _KEY, ">"),
    ("XAUTOCLAIM", _KEY, "group", "consumer", 1, "0"),
    ("XACK", _KEY, "group", "1-0"),
    ("UNLINK", _KEY),
    ("SCAN", 0, "COUNT", 1),
    ("INFO", "memory"),
    ("TIME",),
    ("MULTI",),
    ("EXEC",),
)
ACL_RULES = " ".join(
    [
        "resetkeys resetchannels -@all ~{buffer:*",
        *dict.fromkeys(
            f"+{probe[0].lower()}|{probe[1].lower()}" if probe[0] == "XGROUP" else f"+{probe[0].lower()}"
            for probe in _PROBES
        ),
        "+fcall +function|load",
    ]
)
"""The least that the user of a replay on an external server may do: ``ACL SETUSER replay on >PASSWORD`` and these."""


def split_urls(text: str) -> tuple[str, ...]:
    """URLs that are separated by commas; a comma within one, in a password for example, does no harm."""
    return tuple(_BETWEEN_URLS.split(text)) if text else ()


def require_server(url: str, *, timeout_s: float = 5.0) -> None:
    """Return when the server at ``url`` answers, is new enough for functions, and lets this user do what a replay does.

    Raises:
        Unreachable: no answer.
        Unauthorised: it wants another user or password, or the user may not do enough.
        ConfigError: not a Redis URL, TLS that does not fit, or a server that is too old.
    """
    link = RedisLink(url)
    try:
        (answer,) = link.exchange([("INFO", "server")], timeout_s=timeout_s)
        if isinstance(answer, ReplyError):
            raise _refusal(link, ["info"]) if str(answer).startswith("NOPERM") else link.meaning(answer)
        _require_version(dict(line.split(":", 1) for line in answer.decode().split("\r\n") if ":" in line), link)
        probes = (*_PROBES, ("FCALL", function_name("ping"), 0))
        replies = link.exchange(probes, timeout_s=timeout_s)
        refused = [
            probe[0].lower()
            for probe, reply in zip(probes, replies, strict=True)
            if isinstance(reply, ReplyError) and str(reply).startswith("NOPERM")
        ]
        if refused:
            raise _refusal(link, list(dict.fromkeys(refused)))
        link.require_functions(timeout_s=timeout_s)
    finally:
        link.close()


def _refusal(link: RedisLink, commands: list[str]) -> Unauthorised:
    return Unauthorised(
        f"Redis at {link.address} does not let this user do {', '.join(commands)} on keys {{buffer:*; give it at "
        f"least: {ACL_RULES}"
    )


def _require_version(server: dict[str, str], link: RedisLink) -> None:
    name, oldest = ("Valkey", _OLDEST_VALKEY) if server.get("server_name") == "valkey" else ("Redis", _OLDEST_REDIS)
    version = server.get("valkey_version") or server.get("redis_version") or "0"
    if int(version.split(".")[0]) < oldest:
        raise ConfigError(f"{name} at {link.address} is {version}; version {oldest} or newer is needed for functions")
