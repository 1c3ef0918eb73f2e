import itertools

import numpy as np
import pytest

from vla_dist.replay.config import BufferConfig, TableConfig
from vla_dist.replay.limiter import LimiterConfig
from vla_dist.replay.server import EmbeddedServer
from vla_dist.replay.table import RedisReplayTable
from vla_dist.testing.fakes import make_segment, make_spec

T = 4
SPEC = make_spec(proprio_dim=3, max_episode_steps=20)
_numbers = itertools.count()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """One for all tests that do not stop it; each test takes a buffer of its own."""
    with EmbeddedServer(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def make_table():
    opened = []

    def make(url, *, limiter=None, spec=SPEC):
        config = BufferConfig(
            name=f"buffer-{next(_numbers)}",
            num_steps=T,
            context_steps=3,
            capacity_steps=2000,
            tables=(TableConfig(limiter=limiter or LimiterConfig()),),
        )
        opened.append(RedisReplayTable(url, spec, config))
        return opened[-1]

    yield make
    for table in opened:
        table.close()


@pytest.fixture
def make_episode():
    """The segments of an episode of two segments, six steps."""

    def make(name, *, reward=None):
        segments = [
            make_segment(
                SPEC,
                episode_id=name,
                segment_index=index,
                num_steps=T,
                length=2 if index else None,
                is_last=index == 1,
                success=False,
                seed=sum(name.encode()),
            )
            for index in range(2)
        ]
        if reward is not None:
            segments[0].rewards[0] = np.float32(reward)
        return segments

    return make


@pytest.fixture
def names_in():
    """Names of the complete episodes of a table, sorted, each as often as it is there."""

    def names(table):
        return sorted(segments[0].episode_id for segments in table.episodes())

    return names


@pytest.fixture(scope="session")
def ray_session():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20)
    yield
    ray.shutdown()
