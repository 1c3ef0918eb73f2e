import pytest
import redis
from pyarrow import fs

from vla_dist.replay.archive.folder import ArchiveFolder


@pytest.fixture
def fill(make_episode, append_all):
    """Append episodes of 10 steps named by numbers."""

    def append(table, numbers, *, length=10, **changes):
        for number in numbers:
            append_all(table, make_episode(f"e{number}", length, spec=table.spec, seed=number, **changes))

    return append


@pytest.fixture
def client(server):
    with redis.Redis.from_url(server.url) as connection:
        yield connection


@pytest.fixture(params=["path", "uri", "store"])
def location(request, tmp_path):
    """Folders of each kind: a path, a URI, and a file system that only knows whole writes."""
    if request.param == "path":
        return tmp_path / "archive"
    if request.param == "uri":
        return (tmp_path / "an archive").as_uri()
    return ArchiveFolder(fs._MockFileSystem(), "bucket/archive")
