"""Copies of a server's data that are taken while it is written to."""

import threading

import pytest
import redis

from vla_dist.core.errors import ConfigError, NotFound, ResourceMissing
from vla_dist.replay.backup import back_up, read_backup, restore
from vla_dist.replay.server import EmbeddedServer


def numbers(url):
    with redis.Redis.from_url(url) as client:
        return {int(key): int(client.get(key) or -1) for key in client.scan_iter(count=10_000)}


def test_a_backup_has_all_that_was_acknowledged_before_it_and_a_prefix_of_what_came_during_it(tmp_path):
    """Pairs are written in transactions, and the log is begun anew meanwhile: none may be torn apart."""
    stop, written = threading.Event(), 0

    def write(url):
        nonlocal written
        with redis.Redis.from_url(url) as client:
            while not stop.is_set():
                with client.pipeline(transaction=True) as pipe:
                    pipe.set(str(2 * written), written)
                    pipe.set(str(2 * written + 1), written)
                    pipe.execute()
                written += 1

    with EmbeddedServer(tmp_path / "redis") as server:
        writer = threading.Thread(target=write, args=[server.url])
        writer.start()
        try:
            before, folders = [], []
            for index in range(4):
                while written < 50 * (index + 1):
                    assert writer.is_alive()
                before.append(written)
                if index == 2:
                    with server._admin(socket_timeout_s=10.0) as admin:
                        admin.bgrewriteaof()
                folders.append(tmp_path / f"backup-{index}")
                back_up(server.directory, folders[-1])
        finally:
            stop.set()
            writer.join()
        password = (server.directory / "client.password").read_text()
    assert written > before[-1]
    for index, (least, folder) in enumerate(zip(before, folders, strict=True)):
        assert folder.stat().st_mode & 0o077 == 0
        target = tmp_path / f"restored-{index}"
        assert restore(folder, target) == read_backup(folder)
        with EmbeddedServer(target) as restored:
            found = numbers(restored.url)
            assert restored.url.partition("@")[0].endswith(password)
        count = len(found) // 2
        assert least <= count <= written
        assert found == {key: key // 2 for key in range(2 * count)}


def test_what_cannot_be_backed_up_or_restored_is_said(tmp_path):
    with pytest.raises(NotFound, match="has no log of a server"):
        back_up(tmp_path, tmp_path / "copy")
    with pytest.raises(NotFound, match="is not a whole backup"):
        restore(tmp_path, tmp_path / "redis")
    with EmbeddedServer(tmp_path / "redis") as server:
        back_up(server.directory, tmp_path / "copy")
        with pytest.raises(ConfigError, match="is there already"):
            back_up(server.directory, tmp_path / "copy")
        with pytest.raises(ResourceMissing, match="a server runs on"):
            restore(tmp_path / "copy", server.directory)
        (tmp_path / "file").touch()
        with pytest.raises(ResourceMissing, match="could not be written"):
            back_up(server.directory, tmp_path / "file" / "copy")
    with pytest.raises(ConfigError, match="has data already"):
        restore(tmp_path / "copy", server.directory)
