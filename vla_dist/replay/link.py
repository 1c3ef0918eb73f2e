"""Commands to a Redis server with an end in time, and our function library on it.

Everything here is safe to use from several threads: each exchange takes a connection of its own from the pool.
"""

import hashlib
import time
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError, OutOfMemoryError
from redis.retry import Retry

from vla_dist.core.errors import ConfigError, DataError, NotFound, ReplayWait, Unauthorised, Unreachable

_CONNECT_TIMEOUT_S = 2.0
_LEAST_S = 1.0
_STALL_S = 5.0
"""An exchange that takes longer is given up and tried again."""
_PAUSE_MIN_S, _PAUSE_MAX_S = 0.002, 0.05
_READ_SIZE = 1 << 20
_JOIN_BYTES = 1 << 17
_SOURCE = files("vla_dist.replay").joinpath("functions.lua").read_text()
_DIGEST = hashlib.sha256(_SOURCE.encode()).hexdigest()[:8]
_LIBRARY = _SOURCE.replace("DIGEST", _DIGEST)

Command = Sequence[Any]


def function_name(verb: str) -> str:
    """Name of a function of our library; it holds a digest, so clients of different versions do not collide."""
    return f"vla_{verb}_{_DIGEST}"


def address_of(url: str) -> str:
    """What of a URL may stand in a message: neither user nor password, wherever they were written."""
    return url.partition("?")[0].rpartition("@")[2]


def load_functions(client: redis.Redis) -> None:
    """Load our library where it is missing. Raises redis.RedisError where the server refuses."""
    try:
        client.function_load(_LIBRARY)
    except redis.ResponseError as error:
        if "already exists" not in str(error):
            raise


class ServerFull(ReplayWait):
    """The server's memory limit refuses writes; what was asked for did not happen and may be tried again."""


class Deadline:
    """The rest of a caller's patience, spent in growing pauses between tries."""

    def __init__(self, timeout_s: float) -> None:
        self._end = time.monotonic() + timeout_s
        self._pause_s = _PAUSE_MIN_S
        self.first = True
        """Whether no pause was taken yet."""

    @property
    def left_s(self) -> float:
        return max(0.0, self._end - time.monotonic())

    def pause(self) -> bool:
        """Wait a little before the next try; False, at once, when nothing is left."""
        left = self.left_s
        if left <= 0:
            return False
        time.sleep(min(left, self._pause_s))
        self._pause_s = min(self._pause_s * 1.5, _PAUSE_MAX_S)
        self.first = False
        return True


class RedisLink:
    """Pipelined exchanges with one server."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError where ``url`` is not a Redis URL. Connects at the first exchange."""
        try:
            self._pool = redis.ConnectionPool.from_url(
                url,
                protocol=2,
                socket_timeout=_CONNECT_TIMEOUT_S,
                socket_connect_timeout=_CONNECT_TIMEOUT_S,
                socket_read_size=_READ_SIZE,
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError as error:
            raise ConfigError(f"not a Redis URL ({error}); expected unix://... or redis://...") from error
        # The password must not end up in a message.
        self.address = address_of(url)

    def call(self, commands: Sequence[Command], *, timeout_s: float) -> list[Any]:
        """Replies of all commands, tried again while the server does not answer; so they must bear repetition.

        Blocking: at most ``timeout_s``, and 1 s more so that even an impatient caller gets one honest try.

        Raises:
            Unreachable: no answer within that time.
            ServerFull, Unauthorised, NotFound, DataError: what the first error among the replies means.
        """
        deadline = Deadline(timeout_s)
        while True:
            try:
                replies = self._exchange(commands, timeout_s=min(max(deadline.left_s, _LEAST_S), _STALL_S))
                for reply in replies:
                    if isinstance(reply, redis.RedisError):
                        raise self._meaning(reply)
                return replies
            except Unreachable:
                if not deadline.pause():
                    raise

    def transaction(self, commands: Sequence[Command], *, timeout_s: float) -> list[Any]:
        """As ``call``, and nothing of another client happens between the commands."""
        return self.call([("MULTI",), *commands, ("EXEC",)], timeout_s=timeout_s)[-1]

    def _meaning(self, reply: redis.RedisError) -> Exception:
        text = str(reply)
        # By type: redis-py takes the code off the messages that it knows. A function may still quote one.
        if isinstance(reply, OutOfMemoryError) or "OOM" in text:
            return ServerFull(f"Redis at {self.address} is out of memory; raise its limit or lower capacity_steps")
        if isinstance(reply, (NoPermissionError, redis.AuthenticationError)):
            return Unauthorised(f"Redis at {self.address} refuses this user ({text}); use the URL the server gave")
        if "NOTABLE" in text:
            return NotFound(
                f"the table is gone from Redis at {self.address} (restarted without its data?); construct a new client"
            )
        if "Function not found" in text:
            # Just restarted: whoever owns the server loads the library again.
            return Unreachable(f"Redis at {self.address} has no replay functions; was it restarted without its data?")
        return DataError(f"Redis at {self.address} refused a command: {text}")

    def _exchange(self, commands: Sequence[Command], *, timeout_s: float) -> list[Any]:
        """One try: send all, then read all; an error reply is an item of the list."""
        end = time.monotonic() + timeout_s
        connection = None
        try:
            connection = self._pool.get_connection()
            connection.update_current_socket_timeout(timeout_s)
            packed = connection.pack_commands(commands)
            if sum(map(len, packed)) <= _JOIN_BYTES:
                # redis-py cuts after 6 kB; each piece would be a system call here and a wake-up over there.
                packed = [b"".join(packed)]
            connection.send_packed_command(packed)
            replies: list[Any] = []
            for _ in commands:
                connection.update_current_socket_timeout(max(0.001, end - time.monotonic()))
                try:
                    replies.append(connection.read_response())
                except redis.ResponseError as error:
                    replies.append(error)
            return replies
        except redis.AuthenticationError as error:
            raise Unauthorised(f"{self.address} refuses this user ({error}); use the URL the server gave") from error
        except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
            if connection is not None:
                # Replies may still be on their way: nobody must read them as answers to something else.
                connection.disconnect()
            raise Unreachable(
                f"Redis at {self.address} does not answer ({error}); is it running, and is the URL right?"
            ) from error
        finally:
            if connection is not None:
                self._pool.release(connection)

    def require_functions(self, *, timeout_s: float) -> None:
        """Load our library unless the server has it.

        Raises:
            ConfigError: the server is too old, or refuses FUNCTION LOAD to this user.
            Unreachable: no answer.
        """
        deadline = Deadline(timeout_s)
        while True:
            try:
                ping, load = ("FCALL", function_name("ping"), 0), ("FUNCTION", "LOAD", _LIBRARY)
                if self._exchange([ping], timeout_s=_STALL_S)[0] == b"PONG":
                    return
                reply = self._exchange([load], timeout_s=_STALL_S)[0]
                break
            except Unreachable:
                if not deadline.pause():
                    raise
        if isinstance(reply, redis.RedisError) and "already exists" not in str(reply):
            raise ConfigError(
                f"Redis at {self.address} cannot take the replay functions ({reply}); it must be Redis >= 7 or "
                "Valkey >= 8, and this user needs +function|load once"
            ) from reply

    def close(self) -> None:
        self._pool.disconnect()
