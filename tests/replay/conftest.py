import itertools
from dataclasses import replace

import pytest

from vla_dist.core.types import Segment
from vla_dist.replay.config import TableConfig
from vla_dist.replay.server import EmbeddedServer
from vla_dist.replay.table import RedisReplayTable
from vla_dist.testing.fakes import make_segment, make_spec

T = 4
SPEC = make_spec(max_episode_steps=20)
_names = (f"table-{number}" for number in itertools.count())


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
    """Tables that are closed when the test ends; a new name each time unless one is given."""
    opened = []

    def make(*, url=None, spec=SPEC, seed=0, **settings):
        settings = {"name": next(_names), "num_steps": T, "context_steps": 6, "capacity_steps": 1000, **settings}
        url = url or request.getfixturevalue("server").url
        table = RedisReplayTable(url, spec, TableConfig(**settings), seed=seed)
        opened.append(table)
        return table

    yield make
    for table in opened:
        table.close()


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


@pytest.fixture
def append_all():
    def append(table, segments):
        return [table.append(segment, timeout_s=5.0) for segment in segments]

    return append
