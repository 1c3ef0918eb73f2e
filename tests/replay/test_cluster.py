"""A real Redis Cluster of three nodes on loopback ports: shards find the node that holds their slot."""

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time

import pytest
import redis

from vla_dist.core.errors import Unauthorised, Unreachable
from vla_dist.replay.config import BufferConfig
from vla_dist.replay.link import RedisLink
from vla_dist.replay.server import find_server_program
from vla_dist.replay.shards import ShardedReplayTable
from vla_dist.testing.fakes import make_spec

SPEC = make_spec(max_episode_steps=20)
PASSWORD = "wolpertinger"
SLOTS = (0, 5461, 10923, 16384)


def free_ports(num):
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(num)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


class Node:
    def __init__(self, directory, port, bus_port):
        directory.mkdir()
        self.port, self.bus_port = port, bus_port
        lines = [
            f"port {port}",
            f"cluster-port {bus_port}",
            "bind 127.0.0.1",
            "cluster-enabled yes",
            "cluster-announce-ip 127.0.0.1",
            "cluster-node-timeout 2000",
            f"dir {directory}",
            f"logfile {directory / 'log'}",
            'save ""',
            f"user default on >{PASSWORD} ~* &* +@all",
        ]
        (directory / "node.conf").write_text("\n".join(lines) + "\n")
        self.process = subprocess.Popen([find_server_program(), str(directory / "node.conf")])
        self.admin = redis.Redis(port=port, password=PASSWORD)
        self.url = f"redis://:{PASSWORD}@127.0.0.1:{port}/0"

    def wait_for(self, condition, what):
        end = time.monotonic() + 30.0
        while True:
            with contextlib.suppress(redis.ConnectionError):
                if condition():
                    return
            assert time.monotonic() < end, what
            time.sleep(0.02)

    def close(self):
        self.admin.close()
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait(10)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    folder, ports = tmp_path_factory.mktemp("cluster"), free_ports(6)
    running = [Node(folder / f"node-{n}", ports[n], ports[n + 3]) for n in range(3)]
    try:
        for number, node in enumerate(running):
            node.wait_for(node.admin.ping, "a node does not start")
            node.admin.execute_command("CLUSTER ADDSLOTSRANGE", SLOTS[number], SLOTS[number + 1] - 1)
        for node in running[1:]:
            running[0].admin.execute_command("CLUSTER MEET", "127.0.0.1", node.port, node.bus_port)
        for node in running:
            # Every node must know every slot, or it would send clients nowhere.
            node.wait_for(lambda node=node: b"cluster_slots_ok:16384" in _info(node), "the nodes do not meet")
            node.wait_for(lambda node=node: b"cluster_state:ok" in _info(node), "the cluster is not healthy")
        yield running
    finally:
        for node in running:
            node.close()


def _info(node):
    text = node.admin.execute_command("CLUSTER INFO", **{redis.client.NEVER_DECODE: True})
    return text if isinstance(text, bytes) else "".join(f"{k}:{v}\n" for k, v in text.items()).encode()


@pytest.fixture
def make_sharded(nodes):
    opened = []

    def make(name, urls):
        config = BufferConfig(name=name, num_steps=4, context_steps=6, capacity_steps=6000)
        opened.append(ShardedReplayTable(urls, SPEC, config))
        return opened[-1]

    yield make
    for table in opened:
        table.close()


def slot_of(node, key):
    return node.admin.execute_command("CLUSTER KEYSLOT", key)


def test_shards_find_their_nodes_from_any_one(nodes, make_sharded, make_episode):
    for number, url in enumerate([node.url for node in nodes]):
        table = make_sharded(f"any-{number}", [url] * 4)
        for episode in range(12):
            table.append_all(make_episode(f"e{episode}", 9, seed=episode), timeout_s=10.0)
        assert table.sample(64, timeout_s=10.0).num_windows == 64
        assert len(list(table.episodes())) == 12
        assert table.stats().num_episodes == 12
        homes = set()
        for shard in table.shards:
            slot = slot_of(nodes[0], shard.keys.state)
            (home,) = [node for n, node in enumerate(nodes) if SLOTS[n] <= slot < SLOTS[n + 1]]
            assert shard.link.address.partition("/")[0] == f"127.0.0.1:{home.port}"
            names = list(home.admin.scan_iter(shard.keys.prefix + "*", count=10_000))
            assert any(b":row:" in name for name in names)
            homes.add(home.port)
        assert len(homes) > 1


def test_another_client_opens_the_same_buffer_through_another_node(nodes, make_sharded, make_episode):
    writer = make_sharded("shared", [nodes[0].url] * 3)
    writer.append_all(make_episode("e", 9), timeout_s=10.0)
    reader = make_sharded("shared", [nodes[2].url, nodes[1].url, nodes[0].url])
    assert [segments[0].episode_id for segments in reader.episodes()] == ["e"]
    assert reader.append_all(make_episode("e", 9), timeout_s=10.0) == ["duplicate"] * 3


def test_slots_that_move_while_clients_work_are_followed(nodes, make_sharded, make_episode):
    """An emptied slot is given to another node; the link loads the functions there."""
    link = RedisLink(nodes[0].url)
    slot = slot_of(nodes[0], "{mover}")
    home = next(n for n in range(3) if SLOTS[n] <= slot < SLOTS[n + 1])
    link.call([("SET", "{mover}a", 1)], timeout_s=5.0)
    link.require_functions(timeout_s=5.0)
    assert link.address.endswith(str(nodes[home].port))
    link.call([("DEL", "{mover}a")], timeout_s=5.0)
    target = nodes[(home + 1) % 3]
    for function in target.admin.function_list():
        target.admin.function_delete(dict(zip(function[::2], function[1::2], strict=True))[b"library_name"].decode())
    new_owner = target.admin.execute_command("CLUSTER MYID")
    new_owner = new_owner.decode() if isinstance(new_owner, bytes) else new_owner
    for node in (target, *nodes):
        node.admin.execute_command("CLUSTER SETSLOT", slot, "NODE", new_owner)
    breaks = link.num_breaks
    assert link.call([("SET", "{mover}a", 2), ("GET", "{mover}a")], timeout_s=10.0)[1] == b"2"
    assert link.address.endswith(str(target.port))
    assert link.num_breaks > breaks
    assert target.admin.function_list()
    link.close()


def test_a_node_that_stands_still_is_unreachable_in_time(nodes, make_sharded, make_episode):
    table = make_sharded("still", [nodes[0].url] * 3)
    table.append_all(make_episode("e", 9), timeout_s=10.0)
    table.sample(4, timeout_s=10.0)
    (victim,) = [node for node in nodes if table.shards[0].link.address.partition("/")[0] == f"127.0.0.1:{node.port}"]
    start = time.monotonic()
    os.kill(victim.process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(Unreachable, match=r"shard \d of 3"):
            table.sample(4, timeout_s=1.0)
    finally:
        os.kill(victim.process.pid, signal.SIGCONT)
    assert time.monotonic() - start < 15.0
    for node in nodes:
        node.wait_for(lambda node=node: b"cluster_state:ok" in _info(node), "the cluster does not recover")
    assert table.sample(4, timeout_s=20.0).num_windows == 4


def test_a_redirect_keeps_the_password(nodes):
    wrong = RedisLink(nodes[0].url.replace(PASSWORD, "wrong"))
    with pytest.raises(Unauthorised) as error:
        wrong.call([("GET", "x")], timeout_s=5.0)
    assert "wrong@" not in str(error.value)
    # One of three keys lies on the node that was asked; the others are redirects.
    for key in ("a", "b", "c", "d"):
        link = RedisLink(nodes[0].url)
        assert link.call([("GET", key)], timeout_s=5.0) == [None]
        assert PASSWORD not in link.address
        link.close()
    wrong.close()


def test_redirects_in_a_circle_end():
    """Two servers that each name the other."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [listener.getsockname()[1] for listener in listeners]
    done = threading.Event()

    def serve(mine, other):
        mine.settimeout(0.1)
        while not done.is_set():
            try:
                peer, _ = mine.accept()
            except TimeoutError:
                continue
            with peer:
                peer.settimeout(2.0)
                peer.recv(1000)
                peer.sendall(b"-MOVED 1 127.0.0.1:%d\r\n" % other)

    threads = [threading.Thread(target=serve, args=(listeners[n], ports[1 - n])) for n in range(2)]
    for thread in threads:
        thread.start()
    link = RedisLink(f"redis://127.0.0.1:{ports[0]}/0")
    try:
        with pytest.raises(Unreachable, match="names another node for these keys again and again"):
            link.call([("GET", "x")], timeout_s=5.0)
    finally:
        done.set()
        for thread in threads:
            thread.join()
        for listener in listeners:
            listener.close()
        link.close()
