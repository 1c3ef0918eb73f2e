import os
import signal
import socket
import threading
import time

import numpy as np
import pytest
import redis

from vla_dist.core.errors import ConfigError, DataError, NotFound, Unauthorised, Unreachable
from vla_dist.replay import table as table_module
from vla_dist.replay.link import Deadline, RedisLink
from vla_dist.replay.wire import BulkLayout, pack


@pytest.fixture
def make_link():
    links = []

    def make(url):
        links.append(RedisLink(url))
        return links[-1]

    yield make
    for link in links:
        link.close()


@pytest.fixture
def silent_port():
    """Takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_server_that_is_gone_is_unreachable_within_the_timeout(make_server, make_table, make_episode):
    running = make_server()
    table = make_table(url=running.url)
    running.close()
    for call in (
        lambda: table.append(make_episode("e", 3)[0], timeout_s=0.4),
        lambda: table.sample(1, timeout_s=0.4),
    ):
        start = time.monotonic()
        with pytest.raises(Unreachable, match="does not answer"):
            call()
        assert 0.3 < time.monotonic() - start < 2.0


def test_a_server_that_hangs_is_unreachable_within_the_timeout(make_link, silent_port):
    start = time.monotonic()
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1"):
        make_link(f"redis://:secret@127.0.0.1:{silent_port}").call([("PING",)], timeout_s=1.2)
    assert time.monotonic() - start < 3.5


def test_a_new_table_on_no_server_is_unreachable_in_time(make_table, monkeypatch, tmp_path):
    monkeypatch.setattr(table_module, "_PATIENCE_S", 0.3)
    start = time.monotonic()
    with pytest.raises(Unreachable):
        make_table(url=f"unix://{tmp_path}/nothing.sock")
    assert time.monotonic() - start < 2.0


def test_late_replies_are_nobody_else_s(make_link, server):
    link = make_link(server.url)
    with pytest.raises(Unreachable):
        # BLPOP answers long after we gave up.
        link.call([("BLPOP", "no-such-list", 4)], timeout_s=0.1)
    assert link.call([("ECHO", b"mine")], timeout_s=2.0) == [b"mine"]


def keep_idle(link, num):
    """Leave ``num`` connections behind."""
    together = threading.Barrier(num)

    def ask():
        together.wait()
        link.call([("BLPOP", "no-such-list", 0.05)], timeout_s=5.0)

    threads = [threading.Thread(target=ask) for _ in range(num)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("end", ["closed", "killed"])
def test_connections_that_a_restart_left_dead_are_noticed(make_server, make_link, end):
    first = make_server()
    link = make_link(first.url)
    keep_idle(link, 4)
    link.call([("SET", "k", "v")], timeout_s=5.0)
    if end == "killed":
        os.kill(first.pid, signal.SIGKILL)
    first.close()
    make_server(first.directory)
    # So little time that a single dead connection, tried and given up, would take all of it.
    assert link.call([("GET", "k")], timeout_s=0.0) == [b"v"]
    keep_idle(link, 4)


def test_a_server_that_comes_back_is_found_again(make_server, make_link):
    first = make_server()
    link = make_link(first.url)
    link.call([("SET", "k", "v")], timeout_s=5.0)
    first.close()
    back = threading.Timer(0.4, make_server, args=(first.directory,))
    back.start()
    assert link.call([("GET", "k")], timeout_s=15.0) == [b"v"]
    back.join()


def test_a_stopped_server_is_unreachable_within_the_timeout_and_then_goes_on(make_server, make_link):
    running = make_server()
    link = make_link(running.url)
    keep_idle(link, 2)
    link.call([("SET", "k", "v" * 50)], timeout_s=5.0)
    calls = [
        lambda: link.call([("GET", "k")], timeout_s=1.2),
        lambda: bulks(link, ["k"], [50], timeout_s=1.2),
        lambda: link.bulks_into(b"".join(pack([("GET", "k")])), [memoryview(bytearray(50))], timeout_s=1.2),
    ]
    os.kill(running.pid, signal.SIGSTOP)
    try:
        for call in calls:
            start = time.monotonic()
            with pytest.raises(Unreachable, match="does not answer"):
                call()
            assert 1.0 < time.monotonic() - start < 4.0
    finally:
        os.kill(running.pid, signal.SIGCONT)
    assert link.call([("ECHO", b"mine")], timeout_s=5.0) == [b"mine"]
    assert bulks(link, ["k"], [50], timeout_s=5.0) == [b"v" * 50]


def bulks(link, names, sizes, *, timeout_s=5.0):
    layout = BulkLayout(np.array(sizes))
    request = b"".join(pack([("GET", name) for name in names]))
    arena, starts = link.bulks(request, layout, np.empty(layout.num_bytes, np.uint8), timeout_s=timeout_s)
    return [
        arena[start : start + size].tobytes() if start >= 0 else None
        for start, size in zip(starts.tolist(), sizes, strict=True)
    ]


def test_bulk_strings_are_received_and_errors_have_our_names(make_link, server):
    link = make_link(server.url)
    link.call([("SET", "bulk:a", "x" * 10), ("SET", "bulk:b", "y" * 300_000), ("LPUSH", "bulk:list", "z")], timeout_s=5)
    names, sizes = ["bulk:a", "bulk:none", "bulk:b", "bulk:a"], [10, 5, 300_000, 11]
    expected = [b"x" * 10, None, b"y" * 300_000, None]
    assert bulks(link, names, sizes) == expected
    targets = [bytearray(size) for size in sizes]
    request = b"".join(pack([("GET", name) for name in names]))
    taken = link.bulks_into(request, [memoryview(target) for target in targets], timeout_s=5.0)
    assert taken == [True, False, True, False]
    assert [bytes(targets[0]), bytes(targets[2])] == [expected[0], expected[2]]
    for call in (
        lambda: bulks(link, ["bulk:a", "bulk:list"], [10, 10]),
        lambda: link.bulks_into(b"".join(pack([("GET", "bulk:list")])), [memoryview(bytearray(1))], timeout_s=5.0),
    ):
        with pytest.raises(DataError, match="refused a command: WRONGTYPE"):
            call()
    assert bulks(link, names, sizes) == expected, "the connection with the error was not used again"


def test_a_large_pipeline_is_read_whole(make_link, server):
    link = make_link(server.url)
    payloads = [bytes([i]) * 300_000 for i in range(20)]
    link.call([("SET", f"large:{i}", data, "PX", 20_000) for i, data in enumerate(payloads)], timeout_s=5.0)
    assert link.call([("GET", f"large:{i}") for i in range(20)], timeout_s=5.0) == payloads


def test_threads_do_not_read_each_other_s_replies(make_link, server):
    link = make_link(server.url)
    wrong = []

    def echo(number):
        for turn in range(100):
            word = f"{number}-{turn}".encode()
            if link.call([("ECHO", word)], timeout_s=5.0) != [word]:
                wrong.append(word)

    threads = [threading.Thread(target=echo, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_error_replies_carry_our_names(make_link, server, make_table, make_episode):
    link = make_link(server.url)
    with pytest.raises(Unauthorised, match="no permissions"):
        link.call([("FLUSHALL",)], timeout_s=1.0)
    with pytest.raises(Unreachable, match="has no replay functions"):
        link.call([("FCALL", "vla_commit_00000000", 1, "k")], timeout_s=0.0)
    table = make_table()
    with redis.Redis.from_url(server.url) as client:
        client.unlink(table.keys.state)
    for call in (
        lambda: table.sample(1, timeout_s=1.0),
        lambda: table.append(make_episode("e", 1)[0], timeout_s=1.0),
        table.stats,
        table.limiter_state,
    ):
        with pytest.raises(NotFound, match=r"gone.*construct a new client"):
            call()


def test_a_wrong_password_is_not_tried_again(make_link, server):
    start = time.monotonic()
    with pytest.raises(Unauthorised) as error:
        make_link(f"unix://client:hunter2@{server.directory}/server.sock").call([("PING",)], timeout_s=5.0)
    assert time.monotonic() - start < 1.0
    assert "hunter2" not in str(error.value)


def test_no_redis_url_is_a_config_error():
    with pytest.raises(ConfigError, match="not a Redis URL"):
        RedisLink("http://localhost")


def test_a_deadline_ends():
    deadline = Deadline(0.1)
    assert deadline.first
    start = time.monotonic()
    pauses = 0
    while deadline.pause():
        pauses += 1
    assert 0.09 < time.monotonic() - start < 0.5
    assert pauses > 2
    assert not deadline.first
    assert deadline.left_s == 0.0
