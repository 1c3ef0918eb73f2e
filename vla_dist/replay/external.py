"""A Redis or Valkey that somebody else runs."""

import re

import redis
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError
from redis.retry import Retry

from vla_dist.core.errors import ConfigError, Unauthorised, Unreachable
from vla_dist.replay.link import address_of

_BETWEEN_URLS = re.compile(r",\s*(?=(?:unix|rediss?)://)")
_OLDEST_REDIS, _OLDEST_VALKEY = 7, 8


def split_urls(text: str) -> tuple[str, ...]:
    """URLs that are separated by commas; a comma within one, in a password for example, does no harm."""
    return tuple(_BETWEEN_URLS.split(text)) if text else ()


def require_server(url: str, *, timeout_s: float = 5.0) -> None:
    """Return when the server at ``url`` answers and is new enough for functions.

    Raises:
        Unreachable: no answer.
        Unauthorised: it wants another user or password.
        ConfigError: not a Redis URL, or a server that is too old.
    """
    try:
        client = redis.Redis.from_url(
            url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=Retry(NoBackoff(), 0)
        )
    except ValueError as error:
        raise ConfigError(f"{error}; expected redis://host:6379, rediss://... or unix:///path") from error
    where = address_of(url)
    try:
        server = client.info("server")
    except (redis.AuthenticationError, NoPermissionError) as error:
        raise Unauthorised(f"Redis at {where} refuses this user ({error}); put user:password@ into the URL") from error
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise Unreachable(
            f"Redis at {where} does not answer ({error}); start it, or leave --replay.redis-url out to embed one"
        ) from error
    finally:
        client.close()
    name, oldest = ("Valkey", _OLDEST_VALKEY) if server.get("server_name") == "valkey" else ("Redis", _OLDEST_REDIS)
    version = str(server.get("valkey_version") or server.get("redis_version"))
    if int(version.split(".")[0]) < oldest:
        raise ConfigError(f"{name} at {where} is {version}; version {oldest} or newer is needed for functions")
