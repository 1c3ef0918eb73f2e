"""Connections to Redis whose failures carry this package's names."""

from collections.abc import Iterator
from contextlib import contextmanager

import redis
from redis.backoff import ExponentialBackoff
from redis.exceptions import NoPermissionError, OutOfMemoryError
from redis.retry import Retry

from vla_dist.core.errors import ConfigError, ResourceMissing, Unauthorised, Unreachable

_CONNECT_TIMEOUT_S = 2.0
_READ_SIZE = 1 << 20


def connect(url: str, *, socket_timeout_s: float) -> redis.Redis:
    """A thread-safe client that connects at its first command; reads are retried for about a second.

    Raises:
        ConfigError: ``url`` is not a Redis URL.
    """
    try:
        return redis.Redis.from_url(
            url,
            protocol=2,
            socket_timeout=socket_timeout_s,
            socket_connect_timeout=_CONNECT_TIMEOUT_S,
            socket_read_size=_READ_SIZE,
            retry=Retry(ExponentialBackoff(cap=0.25, base=0.02), 6),
        )
    except ValueError as error:
        raise ConfigError(f"not a Redis URL ({error}); expected unix://... or redis://...") from error


@contextmanager
def named_errors(whose: str = "the registry's Redis") -> Iterator[None]:
    """Turn what redis-py raises into the package's errors; ``whose`` is what the messages call the server."""
    try:
        yield
    except (redis.AuthenticationError, NoPermissionError) as error:
        raise Unauthorised(f"{whose} refuses this user ({error}); use the URL the server gave") from error
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise Unreachable(f"{whose} does not answer ({error}); is it running, and is the URL right?") from error
    except OutOfMemoryError as error:
        raise ResourceMissing(
            f"{whose} is out of memory ({error}); raise its limit, or keep tensors in DirectoryBlobs"
        ) from error
