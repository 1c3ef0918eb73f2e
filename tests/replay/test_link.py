import socket
import threading
import time

import pytest
import redis

from vla_dist.core.errors import ConfigError, NotFound, Unauthorised, Unreachable
from vla_dist.replay import table as table_module
from vla_dist.replay.link import Deadline, RedisLink


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
        link._exchange([("BLPOP", "no-such-list", 2)], timeout_s=0.1)
    assert link.call([("ECHO", b"mine")], timeout_s=2.0) == [b"mine"]


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


def test_error_replies_carry_our_names(make_link, server, make_table):
    link = make_link(server.url)
    with pytest.raises(Unauthorised, match="no permissions"):
        link.call([("FLUSHALL",)], timeout_s=1.0)
    table = make_table()
    with redis.Redis.from_url(server.url) as client:
        client.unlink(table._prefix + "config")
    with pytest.raises(NotFound, match="the table is gone"):
        table.sample(1, timeout_s=1.0)


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
