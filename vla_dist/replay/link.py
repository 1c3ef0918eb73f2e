"""Commands to a Redis server with an end in time, and our function library on it.

Everything here is safe to use from several threads: each exchange takes a connection of its own.
"""

import contextlib
import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, TypeVar

import redis

from vla_dist.core.errors import ConfigError, DataError, NotFound, ReplayWait, Unauthorised, Unreachable
from vla_dist.core.types import Array
from vla_dist.replay.wire import BulkLayout, Command, Endpoint, ReplyError, Wire, pack

_CONNECT_TIMEOUT_S = 2.0
_LEAST_S = 1.0
_MOST_MOVES = 5
_PAUSE_MIN_S, _PAUSE_MAX_S = 0.002, 0.05
_SOURCE = files("vla_dist.replay").joinpath("functions.lua").read_text()
_DIGEST = hashlib.sha256(_SOURCE.encode()).hexdigest()[:8]
_LIBRARY = _SOURCE.replace("DIGEST", _DIGEST)

_NOT_READY = ("LOADING", "MASTERDOWN", "TRYAGAIN", "CLUSTERDOWN", "ASK ")

R = TypeVar("R")


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


class _Moved(Exception):
    """Another node of the cluster holds the keys: its host and port."""


class RedisLink:
    """Pipelined exchanges with one server, or with the node of a Redis Cluster that holds the keys.

    The URL may name any node of a cluster. All keys of one link must lie in one slot.
    """

    def __init__(self, url: str) -> None:
        """Raises ConfigError where ``url`` is not a Redis URL. Connects at the first exchange."""
        self._given = self._endpoint = Endpoint(url)
        self._needs_functions = False
        # The password must not end up in a message.
        self.address = address_of(url)
        self._idle: list[Wire] = []
        self.num_breaks = 0
        """Connections that broke: the server may have restarted, perhaps without its newest data."""
        self._lock = threading.Lock()

    def call(self, commands: Sequence[Command], *, timeout_s: float) -> list[Any]:
        """Replies of all commands, tried again while the server does not answer; so they must bear repetition.

        Blocking: at most ``timeout_s``, and 1 s more so that even an impatient caller gets one honest try.

        Args:
            commands: sent together.
            timeout_s: see above.

        Raises:
            Unreachable: no answer within that time.
            ServerFull, Unauthorised, NotFound, DataError: what the first error among the replies means.
        """
        replies = self.exchange(commands, timeout_s=timeout_s)
        for reply in replies:
            if isinstance(reply, ReplyError):
                raise self.meaning(reply)
        return replies

    def exchange(self, commands: Sequence[Command], *, timeout_s: float) -> list[Any]:
        """As ``call``, with error replies left among the others for the caller to judge by ``meaning``."""
        buffers = pack(commands)

        def send_and_read(wire: Wire, end: float) -> list[Any]:
            wire.send(buffers, end)
            return _read_ready(wire, len(commands), end)

        return self._patiently(send_and_read, timeout_s)

    @contextlib.contextmanager
    def converse(self, *, timeout_s: float) -> Iterator["Conversation"]:
        """Exchanges over one connection, of which the next may begin before the last one ended; tried once.

        Raises:
            Unreachable: no answer within ``timeout_s``, or 1 s if that is more; what was sent may have been done.
            ServerFull, Unauthorised, NotFound, DataError: it refused the connection.
        """
        try:
            with self._connection(max(timeout_s, _LEAST_S)) as (wire, end):
                talk = Conversation(wire, end)
                yield talk
                if talk.num_pending:
                    raise ConnectionError(f"{talk.num_pending} exchanges were left unfinished")
        except _Moved as moved:
            self._move(*moved.args)
            raise Unreachable(f"another node of the Redis Cluster, {self.address}, has these keys now") from moved

    def bulks(self, request: bytes, layout: BulkLayout, arena: Array, *, timeout_s: float) -> tuple[Array, Array]:
        """Packed commands that answer one string each, of known sizes: see ``Wire.read_bulks``. Errors as ``call``."""

        def exchange(wire: Wire, end: float) -> tuple[Array, Array]:
            wire.send([request], end)
            return wire.read_bulks(layout, arena, end)

        return self._patiently(exchange, timeout_s)

    def bulks_into(self, request: bytes, targets: Sequence[memoryview], *, timeout_s: float) -> list[bool]:
        """The same, received into ``targets``: see ``Wire.read_bulks_into``. Errors as ``call``."""

        def exchange(wire: Wire, end: float) -> list[bool]:
            wire.send([request], end)
            return wire.read_bulks_into(targets, end)

        return self._patiently(exchange, timeout_s)

    def require_functions(self, *, timeout_s: float) -> None:
        """Load our library unless the server has it.

        Raises:
            ConfigError: the server is too old, or refuses FUNCTION LOAD to this user.
            Unreachable: no answer.
        """

        self._needs_functions = True

        def exchange(wire: Wire, end: float) -> Any:
            wire.send(pack([("FCALL", function_name("ping"), 0)]), end)
            if _read_ready(wire, 1, end)[0] == b"PONG":
                return None
            wire.send(pack([("FUNCTION", "LOAD", _LIBRARY)]), end)
            return wire.read(1, end)[0]

        reply = self._patiently(exchange, timeout_s)
        if isinstance(reply, ReplyError) and "already exists" not in str(reply):
            raise ConfigError(
                f"Redis at {self.address} lacks the replay functions of this version of vla-dist and cannot take them "
                f"({reply}). An embedded server: use the version that started it. Your own: it must be Redis >= 7 or "
                "Valkey >= 8, and this user needs +function|load once"
            ) from reply

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for wire in idle:
            wire.close()

    def _patiently(self, exchange: Callable[[Wire, float], R], timeout_s: float) -> R:
        deadline = Deadline(timeout_s)
        moves = 0
        while True:
            try:
                return self._once(exchange, timeout_s=max(deadline.left_s, _LEAST_S))
            except _Moved as moved:
                moves += 1
                if moves > _MOST_MOVES:
                    raise Unreachable(
                        f"the Redis Cluster at {self.address} names another node for these keys again and again; is it "
                        "healthy (CLUSTER INFO)?"
                    ) from moved
                self._move(*moved.args)
                if self._needs_functions:
                    self.require_functions(timeout_s=deadline.left_s)
            except Unreachable:
                # The node may have failed over: the one that was given knows.
                self._move(self._given.host, self._given.port)
                if not deadline.pause():
                    raise

    def _move(self, host: str, port: int) -> None:
        """From now on to another node, as the same user."""
        with self._lock:
            if self._endpoint.path is not None or (self._endpoint.host, self._endpoint.port) == (host, port):
                return
            self._endpoint = self._endpoint.at(host, port)
            self.address = f"{host}:{port}"
            # A replica that took over may lack the newest writes.
            self.num_breaks += 1
        self.close()

    def _once(self, exchange: Callable[[Wire, float], R], *, timeout_s: float) -> R:
        with self._connection(timeout_s) as (wire, end):
            return exchange(wire, end)

    @contextlib.contextmanager
    def _connection(self, timeout_s: float) -> Iterator[tuple[Wire, float]]:
        """One that nobody else uses, and until when."""
        end = time.monotonic() + timeout_s
        wire = None
        try:
            wire = self._take(timeout_s)
            yield wire, end
        except ReplyError as error:
            if wire is not None:
                wire.close()
            if str(error).startswith("MOVED "):
                # "MOVED slot host:port"; without a host it is the same one.
                host, _, port = str(error).split()[2].rpartition(":")
                raise _Moved(host or self._endpoint.host, int(port)) from error
            raise self.meaning(error) from error
        except OSError as error:
            self.num_breaks += 1
            if wire is not None:
                # Replies may still be on their way: nobody must read them as answers to something else.
                wire.close()
            raise Unreachable(
                f"Redis at {self.address} does not answer ({error}); is it running, and is the URL right?"
            ) from error
        except BaseException:
            if wire is not None:
                wire.close()
            raise
        with self._lock:
            self._idle.append(wire)

    def _take(self, timeout_s: float) -> Wire:
        while True:
            with self._lock:
                wire = self._idle.pop() if self._idle else None
            if wire is None:
                break
            if not wire.is_stale:
                return wire
            self.num_breaks += 1
            wire.close()
        return Wire(self._endpoint, timeout_s=min(timeout_s, _CONNECT_TIMEOUT_S))

    def meaning(self, reply: ReplyError) -> Exception:
        """The error that a reply stands for."""
        text = str(reply)
        if text.startswith("OOM") or "OOM command" in text:
            return ServerFull(f"Redis at {self.address} is out of memory; raise its limit or lower capacity_steps")
        if text.startswith(("NOPERM", "WRONGPASS", "NOAUTH")):
            return Unauthorised(f"Redis at {self.address} refuses this user ({text}); use the URL the server gave")
        if "NOBUFFER" in text:
            return NotFound(
                f"the table is gone from Redis at {self.address} (restarted without its data?); construct a new client"
            )
        if text.startswith(_NOT_READY):
            return Unreachable(f"Redis at {self.address} is not ready yet ({text})")
        if "Function not found" in text:
            # Just restarted: whoever owns the server loads the library again.
            return Unreachable(f"Redis at {self.address} has no replay functions; was it restarted without its data?")
        return DataError(f"Redis at {self.address} refused a command: {text}")


@dataclass(frozen=True, slots=True)
class Request:
    """Commands as they are sent, made beforehand."""

    num_replies: int
    buffers: Sequence[bytes | memoryview]

    @classmethod
    def of(cls, commands: Sequence[Command]) -> "Request":
        return cls(len(commands), pack(commands))


class Conversation:
    """Exchanges over one connection; made by ``RedisLink.converse``.

    Replies come in the order of what was sent, error replies among the others, see ``RedisLink.meaning``.
    """

    def __init__(self, wire: Wire, end: float) -> None:
        self._wire = wire
        self._end = end
        self._pending: deque[tuple[int, Callable[[list[Any]], None]]] = deque()

    @property
    def num_pending(self) -> int:
        """Exchanges whose replies were not received."""
        return len(self._pending)

    def send(self, request: Request, then: Callable[[list[Any]], None]) -> None:
        """``then`` is given the replies when their turn comes."""
        self._wire.send(request.buffers, self._end)
        self._pending.append((request.num_replies, then))

    def receive(self, *, leave: int = 0) -> None:
        """Until no more than ``leave`` exchanges are pending."""
        while len(self._pending) > leave:
            num, then = self._pending.popleft()
            then(_read_ready(self._wire, num, self._end))


def _read_ready(wire: Wire, num_replies: int, end: float) -> list[Any]:
    """As ``Wire.read``, but a server that still loads its data, or is not the one, has not answered: its ReplyError."""
    replies = wire.read(num_replies, end)
    for reply in replies:
        if isinstance(reply, ReplyError) and str(reply).startswith((*_NOT_READY, "MOVED ")):
            raise reply
    return replies
