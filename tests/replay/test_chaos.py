"""Processes and the server die at random moments, the server stalls, slots are evicted under readers: nothing that was
acknowledged is lost, nothing is stored twice, no window is torn, nobody waits for ever."""

import os
import random
import signal
import socket
import threading
import time

import numpy as np
import pytest
from chaos.ground_truth import require_true_window, true_episode
from chaos.stage import PATIENCE_S, Stage, T
from chaos.storm import Storm, Totals

from vla_dist.core.errors import ReplayWait, Unreachable
from vla_dist.replay.limiter import LimiterConfig
from vla_dist.replay.link import RedisLink
from vla_dist.replay.queue import EpisodeQueue

ACTORS = ("writer-a", "writer-b", "uniform-a", "scored-a", "consumer-a")
MORE_ACTORS = (*ACTORS, "uniform-b", "consumer-b")


@pytest.mark.timeout(300)
def test_a_few_kills_lose_repeat_and_tear_nothing(tmp_path):
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    with Storm(tmp_path, ACTORS, seed=seed) as storm:
        storm.rage(len(ACTORS) + 1)
        totals = storm.settle()
    print(totals)
    assert totals.windows
    assert totals.taken
    assert totals.stored == totals.acknowledged > 0


@pytest.mark.chaos
@pytest.mark.timeout(1500)
def test_a_hundred_kills_lose_repeat_and_tear_nothing(tmp_path):
    seed = int(os.environ.get("CHAOS_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"\nseed {seed} (CHAOS_SEED={seed} repeats the order of the kills)")
    total = Totals()
    for number, (what, kills, actors, capacity_steps) in enumerate(
        [
            ("everything is kept", 60, MORE_ACTORS, 1_000_000),
            ("a small buffer evicts all the time", 50, MORE_ACTORS, 600),
            ("an archive must have what is evicted", 50, (*ACTORS, "archiver-a", "archiver-b"), 1000),
        ]
    ):
        print(f"{what}: {kills} kills")
        with Storm(tmp_path / str(number), actors, seed=seed + number, capacity_steps=capacity_steps) as storm:
            storm.rage(kills)
            totals = storm.settle()
        print(f"  {totals}", flush=True)
        total += totals
    print(f"total: {total}")
    assert total.kills.total() >= 100


@pytest.fixture
def stage(make_server, tmp_path):
    """A buffer of its own, small enough that every new episode evicts one, on a server of its own."""
    running = make_server(tmp_path / "server")
    return running, Stage(url=running.url, capacity_steps=60, seed=0)


@pytest.fixture
def connect(stage):
    clients = []

    def open_client(table, **options):
        clients.append(stage[1].connect(table, seed=len(clients), **options))
        return clients[-1]

    yield open_client
    for client in clients:
        client.close()


def append_episodes(table, first, num):
    for number in range(first, first + num):
        table.append_all(true_episode(f"e-{number}").segments(T), timeout_s=PATIENCE_S)


def test_a_stalled_server_is_reported_in_time_and_everything_goes_on_after(stage, connect):
    running, _ = stage
    uniform, scored, queue_table = connect("uniform"), connect("scored"), connect("queue")
    queue = EpisodeQueue(queue_table, "consumer")
    append_episodes(uniform, 0, 3)
    batch, taken = scored.sample(4, timeout_s=PATIENCE_S), queue.take(1, timeout_s=PATIENCE_S)
    uniform.sample(4, timeout_s=PATIENCE_S)
    segments = true_episode("e-3").segments(T)
    calls = {
        "append": lambda timeout_s: uniform.append(segments[0], timeout_s=timeout_s),
        "append_all": lambda timeout_s: uniform.append_all(segments, timeout_s=timeout_s),
        "sample": lambda timeout_s: uniform.sample(4, timeout_s=timeout_s),
        "sample by priority": lambda timeout_s: scored.sample(4, timeout_s=timeout_s),
        "priorities": lambda timeout_s: scored.update_priorities(batch.items, np.ones(4), timeout_s=timeout_s),
        "take": lambda timeout_s: queue.take(1, timeout_s=timeout_s),
        "acknowledge": lambda timeout_s: queue.acknowledge(taken, timeout_s=timeout_s),
    }
    took = {}

    def time_out(name, call, timeout_s):
        start = time.monotonic()
        with pytest.raises((Unreachable, ReplayWait), match=r"does not answer|within"):
            call(timeout_s)
        took[name] = time.monotonic() - start - timeout_s

    os.kill(running.pid, signal.SIGSTOP)
    try:
        threads = [
            threading.Thread(target=time_out, args=(*item, 0.3 + 0.4 * (n % 3))) for n, item in enumerate(calls.items())
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        os.kill(running.pid, signal.SIGCONT)
    assert set(took) == set(calls), "each call was given up"
    assert max(took.values()) < 1.5, took
    for call in calls.values():
        call(PATIENCE_S)
    state = uniform.state()
    assert state.inserted == sum(true_episode(f"e-{number}").length for number in range(4))
    assert state.completions == 4


def test_a_reader_survives_constant_eviction(connect):
    """Between its draw and its fetch the episodes leave: those windows are drawn anew, none is torn."""
    reader, writer = connect("scored", cache_bytes=0), connect("uniform")
    writer.override_limiter(LimiterConfig())
    connect("queue").override_limiter(LimiterConfig())
    append_episodes(writer, 0, 10)
    stop = threading.Event()
    begun = 10

    def write():
        nonlocal begun
        while not stop.is_set():
            append_episodes(writer, begun, 1)
            begun += 1

    gone = []
    fetch = reader.windows.fetcher.fetch

    def fetch_late(*args, **options):
        until = begun + 2
        while begun < until and not stop.is_set():
            time.sleep(0.001)
        batch, missing = fetch(*args, **options)
        gone.append(int(missing.sum()))
        return batch, missing

    reader.windows.fetcher.fetch = fetch_late
    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(12):
            batch = reader.sample(16, timeout_s=PATIENCE_S)
            for b, name in enumerate(batch.instructions):
                require_true_window(batch, b, true_episode(name), num_steps=T)
            reader.update_priorities(batch.items, np.ones(16))
    finally:
        stop.set()
        thread.join()
    assert sum(gone) > 0, "episodes left in between"
    assert writer.state().evicted_steps > 0


def test_windows_that_left_before_they_were_read_raise_no_warning(connect):
    """Their returns were summed from whatever lay in that memory: infinity less infinity, now and then."""
    reader, writer = connect("scored", cache_bytes=0), connect("uniform")
    append_episodes(writer, 0, 3)
    fetcher, layout = reader.windows.fetcher, reader.codec.layout
    fetch, bulks = fetcher.fetch, reader.link.bulks
    evicted = []

    def receive_worst(*args, **options):
        received, starts = bulks(*args, **options)
        if (starts < 0).all():
            step = received[: 4 * layout.num_columns].view(np.float32)
            step[layout.segment_return], step[layout.segment_return + 1] = np.inf, -np.inf
        return received, starts

    def fetch_late(*args, **options):
        if not evicted:
            append_episodes(writer, 3, 20)
        batch, gone = fetch(*args, **options)
        evicted.append(gone.all())
        return batch, gone

    fetcher.fetch, reader.link.bulks = fetch_late, receive_worst
    batch = reader.sample(1, timeout_s=PATIENCE_S)
    assert evicted == [True, False]
    require_true_window(batch, 0, true_episode(batch.instructions[0]), num_steps=T)


def test_a_server_that_still_loads_its_data_is_waited_for():
    """It was taken for one that refuses: clients gave up at once when a large buffer was restarted."""
    answers = [b"-LOADING loading the dataset\r\n", b"-LOADING loading the dataset\r\n", b"+PONG\r\n"]

    def serve(listener):
        for answer in answers:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(answer)

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        link = RedisLink(f"redis://127.0.0.1:{listener.getsockname()[1]}")
        assert link.call([("PING",)], timeout_s=PATIENCE_S) == [b"PONG"]
        thread.join()
        link.close()
