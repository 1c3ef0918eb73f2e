"""The wire against a peer on a real socket that says what each test tells it, split where the test says."""

import contextlib
import fcntl
import itertools
import os
import socket
import termios
import threading
import time

import hiredis
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_dist.core.errors import ConfigError
from vla_dist.replay.wire import BulkLayout, Endpoint, Wire, pack


class Peer:
    """A listener that gives each connection an answer, one chunk after the other was received."""

    def __init__(self, path):
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self.url = f"unix://{path}"

    @contextlib.contextmanager
    def saying(self, chunks, *, then_closes=False, pause_s=0.0):
        with contextlib.closing(Wire(Endpoint(self.url), timeout_s=5.0)) as wire:
            connection, _ = self._listener.accept()
            connection.settimeout(5.0)
            done = threading.Event()
            speaker = threading.Thread(target=self._say, args=(connection, chunks, pause_s, done, then_closes))
            speaker.start()
            try:
                yield wire
            finally:
                done.set()
                speaker.join()

    def close(self):
        self._listener.close()

    @staticmethod
    def _say(connection, chunks, pause_s, done, then_closes):
        with connection, contextlib.suppress(OSError):
            for chunk in chunks:
                connection.sendall(chunk)
                # What still lies in the socket would be received together with the next chunk.
                while not done.is_set() and any(fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4))):
                    time.sleep(2e-5)
                if done.wait(pause_s):
                    return
            if not then_closes:
                done.wait()


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    speaker = Peer(tmp_path_factory.mktemp("peer") / "socket")
    yield speaker
    speaker.close()


def bulk(data):
    return b"$-1\r\n" if data is None else b"$%d\r\n%b\r\n" % (len(data), data)


def chunks_of(data, cuts):
    bounds = [0, *sorted({cut for cut in cuts if 0 < cut < len(data)}), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(bounds)]


def read_bulks(wire, sizes, *, patience_s=5.0):
    """Each string of the expected size, None for the others."""
    layout = BulkLayout(np.array(sizes))
    arena, starts = wire.read_bulks(layout, np.empty(layout.num_bytes, np.uint8), time.monotonic() + patience_s)
    return [
        arena[start : start + size].tobytes() if start >= 0 else None
        for start, size in zip(starts.tolist(), sizes, strict=True)
    ]


def read_bulks_into(wire, sizes, *, patience_s=5.0):
    """The same."""
    targets = [bytearray(size) for size in sizes]
    taken = wire.read_bulks_into([memoryview(target) for target in targets], time.monotonic() + patience_s)
    return [bytes(target) if good else None for target, good in zip(targets, taken, strict=True)]


readers = pytest.mark.parametrize("read", [read_bulks, read_bulks_into])
SIZES = [3, 12, 5, 120, 1]
STRINGS = [bytes([65 + n]) * size for n, size in enumerate(SIZES)]
STREAM = b"".join(map(bulk, STRINGS))


def if_expected(sent):
    return [data if data is not None and len(data) == size else None for data, size in zip(sent, SIZES, strict=False)]


@readers
@pytest.mark.parametrize("kind", ["no key", "no such range", "shorter", "longer", "much longer"])
def test_strings_that_are_not_as_expected_are_told_apart_at_every_position(peer, read, kind):
    others = {
        "no key": lambda string: None,
        "no such range": lambda string: b"",
        "shorter": lambda string: string[:-1],
        "longer": lambda string: string + b"\r",
        "much longer": lambda string: string + b"$3\r\n" * 3000,
    }
    for where in [*((n,) for n in range(5)), (0, 1), (1, 3), (3, 4), (0, 1, 2, 3, 4)]:
        sent = [others[kind](string) if n in where else string for n, string in enumerate(STRINGS)]
        with peer.saying([b"".join(map(bulk, sent))]) as wire:
            assert read(wire, SIZES) == [None if n in where else string for n, string in enumerate(STRINGS)], where
            assert not wire.is_stale, "no byte is left over for the next exchange"


@readers
def test_a_reply_may_be_split_at_any_byte(peer, read):
    for sent in (STRINGS[:3], [STRINGS[0], None, STRINGS[2]], [b"", b"longer than that", STRINGS[2]]):
        stream = b"".join(map(bulk, sent))
        for cuts in [*((at,) for at in range(1, len(stream))), range(1, len(stream))]:
            with peer.saying(chunks_of(stream, cuts)) as wire:
                assert read(wire, SIZES[:3]) == if_expected(sent)


@readers
def test_missing_strings_that_move_the_others_to_where_another_is_expected(peer, read):
    """Only the last header was looked at: here it was right by chance, and the reader waited for bytes in vain."""
    sent = [None, None, None, None, b"ab", b"cd"]
    with peer.saying([b"".join(map(bulk, sent))]) as wire:
        assert read(wire, [1, 1, 1, 1, 2, 2], patience_s=1.0) == sent


# Strings made of what headers are made of.
tricky = st.binary(max_size=3).map(lambda raw: bytes(b"$13\r\n-"[byte % 6] for byte in raw))


@readers
@given(
    replies=st.lists(st.tuples(st.integers(1, 3), st.none() | tricky | st.just(b"fits")), min_size=1, max_size=7),
    cuts=st.lists(st.integers(1, 60), max_size=3),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_strings_that_look_like_headers_fool_nobody(peer, read, replies, cuts):
    sizes = [size for size, _ in replies]
    sent = [b"$1\r"[:size] if data == b"fits" else data for size, data in replies]
    with peer.saying(chunks_of(b"".join(map(bulk, sent)), cuts)) as wire:
        found = read(wire, sizes, patience_s=1.0)
    assert found == [
        data if data is not None and len(data) == size else None for size, data in zip(sizes, sent, strict=True)
    ]


@readers
def test_an_error_reply_at_any_position_is_raised(peer, read):
    for position in range(5):
        parts = [bulk(string) for string in STRINGS]
        parts[position] = b"-WRONGTYPE Operation against a key\r\n"
        for cuts in ((), (4, 9, 30), range(1, 200)):
            with (
                peer.saying(chunks_of(b"".join(parts), cuts)) as wire,
                pytest.raises(hiredis.ReplyError, match="WRONGTYPE Operation against a key"),
            ):
                read(wire, SIZES)


@readers
@pytest.mark.parametrize("reply", [b":12\r\n", b"*1\r\n$1\r\nx\r\n", b"+OK\r\n"])
def test_a_reply_that_is_no_string_is_an_error_of_the_connection(peer, read, reply):
    with (
        peer.saying([reply + bulk(b"x" * 12)]) as wire,
        pytest.raises(ConnectionError, match="where a string was expected"),
    ):
        read(wire, [3, 12])


@readers
@pytest.mark.parametrize("num_bytes", [0, 1, 5, 9, 12, 27, len(STREAM) - 1])
def test_a_peer_that_stalls_is_given_up_in_time(peer, read, num_bytes):
    with peer.saying(chunks_of(STREAM[:num_bytes], ()) if num_bytes else []) as wire:
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            read(wire, SIZES, patience_s=0.2)
        assert 0.15 < time.monotonic() - start < 2.0


@readers
@pytest.mark.parametrize("num_bytes", [0, 1, 5, 9, 12, 27, len(STREAM) - 1])
def test_a_peer_that_closes_is_an_error_of_the_connection(peer, read, num_bytes):
    with (
        peer.saying([STREAM[:num_bytes]] if num_bytes else [], then_closes=True) as wire,
        pytest.raises(ConnectionError, match="closed the connection"),
    ):
        read(wire, SIZES)


@readers
def test_a_peer_that_drips_is_given_up_in_time(peer, read):
    # The end holds for the whole exchange, not for each piece of it.
    with peer.saying(chunks_of(STREAM, range(1, len(STREAM))), pause_s=0.03) as wire:
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            read(wire, SIZES, patience_s=0.3)
        assert time.monotonic() - start < 2.0


def test_replies_of_any_kind_are_read_and_errors_are_left_among_them(peer):
    stream = b"+OK\r\n:7\r\n$-1\r\n*2\r\n$1\r\na\r\n*-1\r\n-OOM no room\r\n$3\r\nend\r\n"
    for cuts in ((), (3, 20), range(1, len(stream))):
        with peer.saying(chunks_of(stream, cuts)) as wire:
            *replies, error, last = wire.read(6, time.monotonic() + 5.0)
        assert replies == [b"OK", 7, None, [b"a", None]]
        assert isinstance(error, hiredis.ReplyError)
        assert str(error) == "OOM no room"
        assert last == b"end"


def test_bytes_that_nobody_asked_for_make_a_connection_stale(peer):
    with peer.saying([]) as wire:
        assert not wire.is_stale
    with peer.saying([b"+late\r\n"], then_closes=False) as wire:
        wait_until_stale(wire)
    with peer.saying([], then_closes=True) as wire:
        wait_until_stale(wire)


def wait_until_stale(wire):
    end = time.monotonic() + 5.0
    while not wire.is_stale:
        assert time.monotonic() < end
        time.sleep(0.001)


def test_commands_are_packed_as_the_protocol_says():
    large, view = b"l" * 70_000, memoryview(np.arange(20_000, dtype="<u4")).cast("B")
    commands = [
        ("SET", "k", large, "PX", 60_000),
        (b"SET", b"v", view),
        ("SET", "s", memoryview(b"small")),
        ("PING",),
        ("ECHO", "é", 1.5, -2),
    ]
    buffers = pack(commands)
    parser = hiredis.Reader()
    for buffer in buffers:
        parser.feed(bytes(buffer))
    assert [parser.gets() for _ in commands] == [
        [b"SET", b"k", large, b"PX", b"60000"],
        [b"SET", b"v", bytes(view)],
        [b"SET", b"s", b"small"],
        [b"PING"],
        [b"ECHO", "é".encode(), b"1.5", b"-2"],
    ]
    assert parser.gets() is False
    assert any(buffer is large for buffer in buffers), "large arguments are not copied"
    assert any(buffer is view for buffer in buffers)


@pytest.mark.parametrize("shape", [(120_000,), (200, 200, 3)])
def test_arrays_are_sent_as_their_bytes(server, shape):
    values = np.arange(120_000, dtype="<u4").reshape(shape)
    with contextlib.closing(Wire(Endpoint(server.url), timeout_s=5.0)) as wire:
        end = time.monotonic() + 5.0
        wire.send(pack([("SET", "array", values.data, "PX", 10_000), ("GET", "array")]), end)
        assert wire.read(2, end) == [b"OK", values.tobytes()]


def test_more_buffers_than_one_system_call_takes_are_all_sent(server):
    parts = [os.urandom(40_000) for _ in range(700)]
    with contextlib.closing(Wire(Endpoint(server.url), timeout_s=5.0)) as wire:
        end = time.monotonic() + 20.0
        for first in range(0, 700, 100):
            # Replies of one hundred at a time fit into the socket.
            wire.send(pack([("SET", f"part:{n}", parts[n], "PX", 20_000) for n in range(first, first + 100)]), end)
            assert wire.read(100, end) == [b"OK"] * 100
        wire.send(pack([("DEL", *parts[:600])]), end)
        assert wire.read(1, end) == [0]


def test_a_peer_that_takes_nothing_is_given_up_in_time(peer):
    with peer.saying([]) as wire, pytest.raises(TimeoutError):
        wire.send([bytes(1 << 25)], time.monotonic() + 0.2)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_user_password_and_database_are_told_first(kind, make_server):
    running = make_server(port=0)
    url = {"tcp": running.tcp_url, "unix": running.url}[kind]
    base = url.removesuffix("0")
    with contextlib.closing(Wire(Endpoint(url), timeout_s=5.0)) as wire:
        wire.send(pack([("SET", "k", "zero")]), time.monotonic() + 5.0)
        assert wire.read(1, time.monotonic() + 5.0) == [b"OK"]
    with contextlib.closing(Wire(Endpoint(f"{base}3"), timeout_s=5.0)) as wire:
        wire.send(pack([("GET", "k")]), time.monotonic() + 5.0)
        assert wire.read(1, time.monotonic() + 5.0) == [None], "another database"
    with pytest.raises(hiredis.ReplyError, match="DB index"):
        Wire(Endpoint(f"{base}9999"), timeout_s=5.0)
    with pytest.raises(hiredis.ReplyError, match="WRONGPASS"):
        Wire(Endpoint(url.replace("client:", "client:x")), timeout_s=5.0)


@pytest.mark.parametrize("url", ["http://localhost", "localhost:6379", "", "redis://host:port/0"])
def test_what_is_no_redis_url_is_a_config_error(url):
    with pytest.raises(ConfigError, match="not a Redis URL"):
        Endpoint(url)


def test_a_tls_server_that_nobody_checks_is_refused():
    for option in ("none", "optional"):
        with pytest.raises(ConfigError, match="ssl_cert_reqs must be left out"):
            Endpoint(f"rediss://localhost:6379/0?ssl_cert_reqs={option}")
    assert Endpoint("rediss://localhost:6379/0?ssl_cert_reqs=required").tls


@pytest.mark.parametrize("option", ["ssl_ca_certs", "ssl_certfile"])
def test_tls_files_that_cannot_be_read_are_a_config_error(option, tmp_path):
    (tmp_path / "broken.pem").write_text("no certificate")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        for path in (tmp_path / "missing.pem", tmp_path / "broken.pem"):
            with pytest.raises(ConfigError, match="the TLS files of the Redis URL cannot be used"):
                Wire(Endpoint(f"rediss://127.0.0.1:{port}/0?{option}={path}"), timeout_s=2.0)
