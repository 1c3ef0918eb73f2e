import numpy as np
import pytest

from vla_dist.core.types import PolicyArtifact, PolicyManifest
from vla_dist.registry.blobs import RedisBlobs
from vla_dist.registry.store import RedisPolicyRegistry
from vla_dist.replay.server import EmbeddedServer
from vla_dist.testing.fakes import make_spec


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """One for all tests; each publishes under a name of its own."""
    with EmbeddedServer(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def url(server):
    return server.url


@pytest.fixture
def make_registry(url):
    """Registries that are closed when the test ends; tensors lie in the same Redis unless blobs are given."""
    opened = []

    def make(*, url=url, blobs=None):
        registry = RedisPolicyRegistry(url, blobs or RedisBlobs(url))
        opened.append(registry)
        return registry

    yield make
    for registry in opened:
        registry.close()


@pytest.fixture
def registry(make_registry):
    return make_registry()


@pytest.fixture
def name(request):
    """A policy name that no other test uses."""
    return request.node.name.replace("[", "-").rstrip("]").replace(" ", "-")[:64]


@pytest.fixture
def make_artifact(name):
    def make(value=0.0, **changes):
        fields = {"name": name, "architecture": "fake", "config": {}, "spec": make_spec(), "horizon": 4, **changes}
        tensors = {"bias": np.array([value], np.float32), "steps": np.arange(6).reshape(2, 3)}
        return PolicyArtifact(manifest=PolicyManifest(**fields), tensors=tensors)

    return make
