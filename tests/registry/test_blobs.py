import hashlib
import threading

import fsspec
import pytest
from pyarrow.fs import FSSpecHandler, LocalFileSystem, PyFileSystem

from vla_dist.core.errors import ConfigError, DataError, IntegrityError, NotFound, ResourceMissing, Unreachable
from vla_dist.registry import blobs as blobs_module
from vla_dist.registry.blobs import ArrowBlobs, DirectoryBlobs, RedisBlobs, open_blobs
from vla_dist.replay.server import EmbeddedServer


@pytest.fixture(params=["redis", "directory", "arrow"])
def blobs(request, url, tmp_path):
    if request.param == "arrow":
        return ArrowBlobs(LocalFileSystem(), str(tmp_path / "bucket" / "blobs"))
    return open_blobs(url if request.param == "redis" else str(tmp_path / "blobs"))


def test_bytes_lie_under_their_hash(blobs):
    data = b"some tensors"
    digest = blobs.put(data)
    assert digest == hashlib.sha256(data).hexdigest()
    assert blobs.get(digest) == data
    assert blobs.put(data) == digest
    with pytest.raises(NotFound, match="publish the version again"):
        blobs.get("0" * 64)
    assert blobs.delete(digest)
    assert not blobs.delete(digest)
    with pytest.raises(NotFound):
        blobs.get(digest)


def test_objects_are_refused_when_damaged_and_appear_whole(tmp_path):
    blobs = ArrowBlobs(LocalFileSystem(), str(tmp_path))
    digest = blobs.put(b"good")
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"evil")
    with pytest.raises(IntegrityError, match="damaged or tampered with"):
        blobs.put(b"good")
    with pytest.raises(IntegrityError):
        blobs.get(digest)

    class FullDisk(FSSpecHandler):
        def open_output_stream(self, path, metadata):
            assert ".writing-" in path, "not under its hash before it is whole"
            raise OSError("no space left on device")

    full = ArrowBlobs(PyFileSystem(FullDisk(fsspec.filesystem("file"))), str(tmp_path))
    with pytest.raises(Unreachable, match="no space left"):
        full.put(b"other")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_place_is_found_by_its_scheme(url, tmp_path):
    assert isinstance(open_blobs(url), RedisBlobs)
    assert isinstance(open_blobs(f"file://{tmp_path}/here"), DirectoryBlobs)
    assert isinstance(open_blobs("mock:///bucket"), ArrowBlobs)
    for nowhere in ("", "gopher://x/y"):
        with pytest.raises(ConfigError):
            open_blobs(nowhere)


def test_a_file_is_never_overwritten(tmp_path):
    blobs = DirectoryBlobs(tmp_path)
    digest = blobs.put(b"good")
    (path,) = tmp_path.iterdir()
    before = path.stat()
    blobs.put(b"good")
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    path.write_bytes(b"evil")
    with pytest.raises(IntegrityError, match="damaged or tampered with"):
        blobs.put(b"good")
    assert path.read_bytes() == b"evil", "left for a person to look at"
    with pytest.raises(IntegrityError):
        blobs.get(digest)


def test_a_writer_that_fails_leaves_no_half_file(tmp_path, monkeypatch):
    blobs = DirectoryBlobs(tmp_path)
    seen = []

    def full_disk(descriptor):
        seen.extend(path.name for path in tmp_path.iterdir())
        raise OSError("no space left on device")

    monkeypatch.setattr(blobs_module.os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        blobs.put(b"data")
    assert [name.startswith(".writing-") for name in seen] == [True], "not under its hash before it is whole"
    assert list(tmp_path.iterdir()) == []


def test_writers_of_the_same_bytes_do_not_disturb_each_other(tmp_path):
    data = b"x" * 1_000_000
    errors = []

    def write():
        try:
            blobs = DirectoryBlobs(tmp_path)
            assert blobs.get(blobs.put(data)) == data
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [path.name for path in tmp_path.iterdir()] == [hashlib.sha256(data).hexdigest() + ".safetensors"]


def test_a_place_that_is_no_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot keep blobs"):
        DirectoryBlobs(tmp_path / "file" / "blobs")


def test_bytes_that_redis_cannot_take_are_refused(url, tmp_path, monkeypatch):
    monkeypatch.setattr(blobs_module, "_LARGEST_VALUE", 100)
    with pytest.raises(DataError, match=r"101 bytes.*use DirectoryBlobs"):
        RedisBlobs(url).put(b"x" * 101)
    with EmbeddedServer(tmp_path, max_memory_bytes=2**24) as full:
        monkeypatch.undo()
        store = RedisBlobs(full.url)
        with pytest.raises(ResourceMissing, match="out of memory"):
            [store.put(bytes([i]) * 2**21) for i in range(10)]
