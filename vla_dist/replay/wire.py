"""One connection to a Redis server that moves bulk data with as few copies as a socket allows.

Commands go out by scatter/gather without being joined; large replies are received straight into the array they are for.
redis-py spends two to six times as much time in the client above 256 KB, and the client, not Redis, is the bottleneck.

A connection on which anything went wrong must be closed: replies may still be on their way.
"""

import copy
import select
import socket
import ssl
import time
from collections.abc import Iterable, Sequence
from typing import Any, cast

import hiredis
import numpy as np
from redis.connection import parse_url

from vla_dist.core.errors import ConfigError
from vla_dist.core.types import Array

_JOIN_BYTES = 1 << 15
"""Smaller arguments are copied beside each other, larger ones are sent from where they are."""
_MOST_BUFFERS = 512
_RECEIVE_BYTES = 1 << 17
_SEND_BUFFER_BYTES = 1 << 20
_HEADER_BYTES = 64
_STALL_S = 5.0
"""A peer that moves no byte for so long is given up; as long as bytes move, only the caller's time counts."""

Command = Sequence[Any]
ReplyError = hiredis.ReplyError


class Endpoint:
    """Where a server is and who we are to it, from a URL.

    ``redis://user:password@host:port/db``, ``rediss://...`` (TLS) or ``unix://user:password@/path?db=0``. TLS options
    are those of redis-py: ``ssl_ca_certs``, ``ssl_certfile``, ``ssl_keyfile`` and ``ssl_check_hostname``.
    """

    def __init__(self, url: str) -> None:
        """Raises ConfigError where ``url`` is not a Redis URL."""
        try:
            options = cast(dict[str, Any], parse_url(url))
        except ValueError as error:
            raise ConfigError(f"not a Redis URL ({error}); expected unix://..., redis://... or rediss://...") from error
        self.path: str | None = options.get("path")
        self.host: str = options.get("host", "localhost")
        self.port = int(options.get("port", 6379))
        self._database = int(options.get("db", 0))
        self._username: str | None = options.get("username")
        self._password: str | None = options.get("password")
        self.tls = url.startswith("rediss://")
        self._tls_options = {name: value for name, value in options.items() if name.startswith("ssl_")}
        if self.tls and str(self._tls_options.get("ssl_cert_reqs", "required")) != "required":
            raise ConfigError("ssl_cert_reqs must be left out: a server that nobody checks may be anybody")

    def at(self, host: str, port: int) -> "Endpoint":
        """The same user elsewhere."""
        other = copy.copy(self)
        other.host, other.port = host, port
        return other

    def greeting(self) -> list[Command]:
        """What a fresh connection must say first."""
        commands: list[Command] = []
        if self._password is not None:
            names = () if self._username is None else (self._username,)
            commands.append(("AUTH", *names, self._password))
        if self._database:
            commands.append(("SELECT", self._database))
        return commands

    def open_socket(self, timeout_s: float) -> socket.socket:
        """Raises OSError, ConfigError for TLS files that cannot be read."""
        if self.path is not None:
            plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            # Linux gives 200 KB, less than a batch: then the sender is woken for each rest. TCP finds its own size.
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
            plain.settimeout(timeout_s)
            try:
                plain.connect(self.path)
            except OSError:
                plain.close()
                raise
            return plain
        context = self._tls_context() if self.tls else None
        plain = socket.create_connection((self.host, self.port), timeout_s)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if context is None:
            return plain
        try:
            return context.wrap_socket(plain, server_hostname=self.host)
        except ssl.SSLCertVerificationError as error:
            plain.close()
            raise ConfigError(
                f"the certificate of Redis at {self.host}:{self.port} is not accepted: {error.verify_message}. Use a "
                "host name that it is made for, and name the authority that signed it with ssl_ca_certs=FILE in the URL"
            ) from error
        except (ssl.SSLError, TimeoutError, ConnectionError) as error:
            plain.close()
            raise ConnectionError(
                f"no TLS handshake: {getattr(error, 'reason', None) or error}; redis:// is for servers without TLS, "
                "and some ask for a client certificate: ssl_certfile, ssl_keyfile"
            ) from error
        except OSError:
            plain.close()
            raise

    def _tls_context(self) -> ssl.SSLContext:
        options = self._tls_options
        try:
            context = ssl.create_default_context(cafile=options.get("ssl_ca_certs"))
            if options.get("ssl_certfile"):
                context.load_cert_chain(options["ssl_certfile"], options.get("ssl_keyfile"))
        except OSError as error:
            raise ConfigError(f"the TLS files of the Redis URL cannot be used ({error})") from error
        context.check_hostname = bool(options.get("ssl_check_hostname", True))
        return context


class Wire:
    """An open connection. Times are ends on the monotonic clock; TimeoutError and OSError come through."""

    def __init__(self, endpoint: Endpoint, *, timeout_s: float) -> None:
        """Connect and log in.

        Raises:
            OSError: no connection.
            hiredis.ReplyError: the server refuses the user, the password or the database.
        """
        self._socket = endpoint.open_socket(timeout_s)
        self._reader = hiredis.Reader(replyError=hiredis.ReplyError)
        self._scratch = bytearray(_RECEIVE_BYTES)
        try:
            greeting = endpoint.greeting()
            if greeting:
                end = time.monotonic() + timeout_s
                self.send(pack(greeting), end)
                for reply in self.read(len(greeting), end):
                    if isinstance(reply, hiredis.ReplyError):
                        raise reply
        except BaseException:
            self.close()
            raise

    @property
    def is_stale(self) -> bool:
        """Whether an idle connection was closed by the server, or holds bytes that nobody asked for."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def send(self, buffers: Sequence[bytes | memoryview], end: float) -> None:
        """All of it, or an error."""
        if isinstance(self._socket, ssl.SSLSocket):
            for buffer in buffers:
                self._patience(end)
                self._socket.sendall(buffer)
            return
        waiting = [memoryview(buffer).cast("B") for buffer in buffers]
        first = 0
        while first < len(waiting):
            self._patience(end)
            sent = self._socket.sendmsg(waiting[first : first + _MOST_BUFFERS])
            while first < len(waiting) and sent >= len(waiting[first]):
                sent -= len(waiting[first])
                first += 1
            if sent:
                waiting[first] = waiting[first][sent:]

    def read(self, num_replies: int, end: float) -> list[Any]:
        """Replies of any kind; an error reply is an item of the list."""
        replies: list[Any] = []
        while len(replies) < num_replies:
            try:
                reply = self._reader.gets()
            except hiredis.ProtocolError as error:
                raise ConnectionError(f"that is not Redis ({error}); a server with TLS needs rediss://") from error
            if reply is False:
                size = self._receive(memoryview(self._scratch), end)
                self._reader.feed(cast(bytes, self._scratch), 0, size)
            else:
                replies.append(reply)
        return replies

    def read_bulks(self, layout: "BulkLayout", arena: Array, end: float) -> tuple[Array, Array]:
        """Strings of sizes that are known beforehand, left where they are received.

        Args:
            layout: of the N strings.
            arena: uint8, at least ``layout.num_bytes`` long; overwritten.

        Returns:
            The received bytes, in ``arena`` unless a reply was unexpected, and (N,) where in them each string starts;
            -1 for one of another size or a missing one.

        Raises:
            hiredis.ReplyError: the first error among the replies.
        """
        filled, expected, view = 0, 0, arena.data
        while filled < layout.num_bytes:
            filled += self._receive(view[filled : layout.num_bytes], end)
            # Fewer bytes may come than expected: waiting for all of them could last for ever.
            expected, unexpected = layout.compare(arena, expected, filled)
            if unexpected:
                return self._read_unexpected(bytearray(view[:filled]), layout, expected, end)
        return arena, layout.starts

    def _read_unexpected(self, received: bytearray, layout: "BulkLayout", good: int, end: float) -> tuple[Array, Array]:
        """The rest of ``read_bulks``, one reply after the other, from the first one that is not as expected."""
        starts = layout.starts.copy()
        position = int(layout.headers[good])
        for number in range(good, len(layout.sizes)):
            while (line_end := received.find(b"\r\n", position)) < 0:
                received += self._receive_some(_HEADER_BYTES, end)
            kind, size = received[position : position + 1], bytes(received[position + 1 : line_end])
            if kind == b"-":
                raise hiredis.ReplyError(size.decode(errors="replace"))
            if kind != b"$":
                raise ConnectionError(f"a reply of kind {bytes(kind)!r} where a string was expected")
            starts[number] = line_end + 2 if int(size) == layout.sizes[number] else -1
            position = line_end + 2 + (int(size) + 2 if int(size) >= 0 else 0)
            while len(received) < position:
                received += self._receive_some(position - len(received), end)
        # Callers look where a missing string would have been, too.
        received += bytes(max(0, layout.num_bytes - len(received)))
        return np.frombuffer(received, np.uint8), starts

    def read_bulks_into(self, targets: Iterable[memoryview], end: float) -> list[bool]:
        """Strings, each received straight into its target; False for one of another size or a missing one.

        Raises:
            hiredis.ReplyError: the first error among the replies.
        """
        taken = []
        pending = b""
        for target in targets:
            while (line_end := pending.find(b"\r\n")) < 0:
                pending += self._receive_some(_HEADER_BYTES, end)
            line, pending = pending[:line_end], pending[line_end + 2 :]
            if line[:1] == b"-":
                raise hiredis.ReplyError(line[1:].decode(errors="replace"))
            if line[:1] != b"$":
                raise ConnectionError(f"a reply that starts with {line[:1]!r} where a string was expected")
            size = int(line[1:])
            fits = size == len(target)
            body = target if fits else memoryview(bytearray(max(0, size)))
            early = min(len(pending), len(body))
            body[:early] = pending[:early]
            pending = pending[early:]
            filled = early
            while filled < len(body):
                filled += self._receive(body[filled:], end)
            while size >= 0 and len(pending) < 2:
                pending += self._receive_some(2 - len(pending), end)
            pending = pending[2:] if size >= 0 else pending
            taken.append(fits)
        return taken

    def close(self) -> None:
        self._socket.close()

    def _receive_some(self, most: int, end: float) -> bytes:
        size = self._receive(memoryview(self._scratch)[: min(most, _RECEIVE_BYTES)], end)
        return bytes(self._scratch[:size])

    def _receive(self, view: memoryview, end: float) -> int:
        self._patience(end)
        size = self._socket.recv_into(view)
        if not size:
            raise ConnectionError("the server closed the connection")
        return size

    def _patience(self, end: float) -> None:
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the time is up")
        self._socket.settimeout(min(left, _STALL_S))


class BulkLayout:
    """Where N strings of known sizes lie in the bytes of their replies, if all are there."""

    def __init__(self, sizes: Array) -> None:
        digits = 1 + (sizes[:, None] >= 10 ** np.arange(1, 10)).sum(axis=1)
        self.sizes = sizes
        self._header_bytes = digits + 3
        ends = np.cumsum(self._header_bytes + sizes + 2)
        self.num_bytes = int(ends[-1])
        self.headers = ends - (self._header_bytes + sizes + 2)
        """(N,) where each reply begins."""
        self.starts = self.headers + self._header_bytes
        """(N,) where each string begins."""
        kinds, self._kind = np.unique(sizes, return_inverse=True)
        width = int(self._header_bytes.max())
        texts = [b"$%d\r\n" % size for size in kinds.tolist()]
        self._texts = np.frombuffer(b"".join(text.ljust(width, b"\0") for text in texts), np.uint8).reshape(-1, width)

    def compare(self, received: Array, first: int, filled: int) -> tuple[int, bool]:
        """Headers from the reply ``first`` on, as far as received, with the expected ones.

        Returns:
            The first reply that is not known to be as expected, and whether it is known not to be.
        """
        begun = int(np.searchsorted(self.headers, filled))
        columns = np.arange(self._texts.shape[1])
        places = self.headers[first:begun, None] + columns
        known = (columns < self._header_bytes[first:begun, None]) & (places < filled)
        # Of the header that came in part the rest is read where it is; the arena ends later.
        differs = received[np.minimum(places, len(received) - 1)] != self._texts[self._kind[first:begun]]
        wrong = (differs & known).any(axis=1)
        if wrong.any():
            return first + int(wrong.argmax()), True
        return max(first, begun - 1), False


def pack(commands: Iterable[Command]) -> list[bytes | memoryview]:
    """Commands as buffers to send, the large arguments uncopied."""
    buffers: list[bytes | memoryview] = []
    small: list[bytes | memoryview] = []
    for command in commands:
        small.append(b"*%d\r\n" % len(command))
        for argument in command:
            kind = type(argument)
            if kind is bytes:
                data, size = argument, len(argument)
            elif kind is memoryview:
                data, size = argument, argument.nbytes
            else:
                data = str(argument).encode()
                size = len(data)
            if size < _JOIN_BYTES:
                small += (b"$%d\r\n" % size, data, b"\r\n")
            else:
                small.append(b"$%d\r\n" % size)
                buffers += (b"".join(small), data)
                small = [b"\r\n"]
    buffers.append(b"".join(small))
    return buffers
