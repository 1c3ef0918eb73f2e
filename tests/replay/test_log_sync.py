"""Nothing acknowledged waits in the server's own memory, whatever the disk does."""

import os
import signal
import subprocess
import sys
import time

import redis

from vla_dist.replay.log_sync import sync_log
from vla_dist.replay.server import EmbeddedServer

BUSY_DISK = """
import os, sys
with open(sys.argv[1], "wb") as file:
    while True:
        file.seek(0)
        file.write(os.urandom(1 << 20) * 32)
        file.flush()
        os.fsync(file.fileno())
"""


def test_the_kernel_has_each_write_before_it_is_acknowledged(tmp_path):
    # Syncs that take long are when a server would hold writes back, and lose them if it were killed then.
    disk = subprocess.Popen([sys.executable, "-c", BUSY_DISK, str(tmp_path / "busy")])
    payload = os.urandom(20_000)
    try:
        with EmbeddedServer(tmp_path / "redis") as server, redis.Redis.from_url(server.url) as client:
            (log,) = (tmp_path / "redis" / "appendonlydir").glob("*.incr.aof")
            end = time.monotonic() + 4.0
            number, size = 0, log.stat().st_size
            # At 256 MB the server would begin another file.
            while time.monotonic() < end and size < 200e6:
                client.set(f"key-{number % 100}", payload)
                before, size = size, log.stat().st_size
                assert size - before > len(payload), f"write {number} was acknowledged before the kernel had it"
                number += 1
            assert number > 100
            os.kill(server.pid, signal.SIGKILL)
    finally:
        disk.kill()
        disk.wait(10)


def test_the_newest_part_of_a_log_is_synced_and_a_missing_one_is_no_error(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fdatasync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    sync_log(tmp_path / "none")
    for name in ("a.aof.1.incr.aof", "a.aof.9.incr.aof", "a.aof.10.incr.aof", "a.aof.10.base.rdb"):
        (tmp_path / name).touch()
    sync_log(tmp_path)
    assert synced == [str(tmp_path / "a.aof.10.incr.aof")]
