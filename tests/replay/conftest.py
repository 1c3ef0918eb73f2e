import dataclasses
import itertools
import struct
from dataclasses import replace

import pytest
import redis

from vla_dist.core.types import Segment
from vla_dist.replay.config import BufferConfig, TableConfig
from vla_dist.replay.keys import episode_digest
from vla_dist.replay.server import EmbeddedServer
from vla_dist.replay.table import RedisReplayTable
from vla_dist.testing.fakes import make_segment, make_spec

T = 4
SPEC = make_spec(max_episode_steps=20)
_names = (f"buffer-{number}" for number in itertools.count())
_TABLE_SETTINGS = {"sampler", "limiter", "max_draws"}


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """One for all tests that neither kill nor fill it; each test takes tables of its own."""
    with EmbeddedServer(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def make_server(tmp_path):
    """Servers of a test's own, on directories named after their number unless one is given."""
    started = []

    def make(directory=None, **options):
        running = EmbeddedServer(directory or tmp_path / f"server-{len(started)}", **options)
        started.append(running)
        return running

    yield make
    for running in started:
        running.close()


@pytest.fixture
def make_table(request):
    """Clients that are closed when the test ends; of a new buffer each time unless a name is given.

    ``sampler``, ``limiter`` and ``max_draws`` are those of its only table, unless ``tables`` are given.
    """
    opened = []

    def make(*, url=None, spec=SPEC, seed=0, table=None, images_url=None, **settings):
        mine = {key: settings.pop(key) for key in _TABLE_SETTINGS & set(settings)}
        defaults = {"name": next(_names), "num_steps": T, "context_steps": 6, "capacity_steps": 1000}
        config = BufferConfig(**{**defaults, "tables": (TableConfig(**mine),), **settings})
        url = url or request.getfixturevalue("server").url
        opened.append(RedisReplayTable(url, spec, config, table=table, seed=seed, images_url=images_url))
        return opened[-1]

    yield make
    for table in opened:
        table.close()


@pytest.fixture
def make_client(make_table):
    """Another client of a table's buffer, as another process would have; ``of`` names another of its tables."""

    def make(table, *, url=None, seed=0, of=None, **changes):
        settings = {field.name: getattr(table.config, field.name) for field in dataclasses.fields(BufferConfig)}
        return make_table(url=url, spec=table.spec, seed=seed, table=of or table.table.name, **{**settings, **changes})

    return make


@pytest.fixture
def keys_of(request):
    """Names of all keys of a table's buffer."""

    def scan(table, *, url=None):
        with redis.Redis.from_url(url or request.getfixturevalue("server").url) as client:
            return sorted(key.decode() for key in client.scan_iter(table.keys.prefix + "*", count=10_000))

    return scan


@pytest.fixture
def make_episode():
    """All segments of an episode of ``length`` steps."""

    def make(
        episode_id, length, *, spec=SPEC, num_steps=T, success=False, task="go", seed=0, **changes
    ) -> list[Segment]:
        last = (length - 1) // num_steps
        return [
            replace(
                make_segment(
                    spec,
                    episode_id=episode_id,
                    segment_index=index,
                    num_steps=num_steps,
                    length=length - last * num_steps if index == last else None,
                    is_last=index == last,
                    success=success and index == last,
                    task=task,
                    seed=seed,
                ),
                **changes,
            )
            for index in range(last + 1)
        ]

    return make


@pytest.fixture(scope="session")
def pack_entry():
    """An entry of the stream of complete episodes, as LIVE and SEGMENT in ``functions.lua`` say."""

    def pack(
        completion,
        row,
        length,
        *,
        num_steps=T,
        source=0,
        success=False,
        intervened=False,
        task="go",
        instruction="please go",
        returns=None,
        versions=None,
        completed_at_s=0.0,
    ):
        num = -(-length // num_steps)
        returns = [0.0] * num if returns is None else returns
        versions = [0] * num if versions is None else versions
        episode_id = f"e{completion}"
        texts = [text.encode() for text in (episode_id, task, instruction)]
        digest = episode_digest(episode_id).encode()
        head = (completion, row, length, num, source, success, intervened, 0, completed_at_s, digest)
        segments = [struct.pack("<dd", *values) for values in zip(returns, versions, strict=True)]
        return b"".join([struct.pack("<ddIIBBBBd16sHHH", *head, *map(len, texts)), *texts, *segments])

    return pack


@pytest.fixture
def append_all():
    def append(table, segments):
        return [table.append(segment, timeout_s=5.0) for segment in segments]

    return append
