"""A real server on loopback that can be killed and started again on its port."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from vla_dist.core.protocols import PolicyLoader
from vla_dist.robot.client import PolicyClient
from vla_dist.robot.reconnect_config import ReconnectConfig
from vla_dist.serving.ingest import FleetIngest, IngestConfig
from vla_dist.serving.server import SingleServer
from vla_dist.serving.service_config import ServiceConfig
from vla_dist.testing.fakes import make_spec
from vla_dist.testing.registry import InMemoryRegistry, fake_artifact, load_fake
from vla_dist.testing.serving import ListTable, build_service

SPEC = make_spec()
RECONNECT = ReconnectConfig(budget_s=5.0, stall_s=0.5)


@dataclass
class Site:
    """Registry and table that outlive the server, as Redis does."""

    registry: InMemoryRegistry = field(default_factory=InMemoryRegistry)
    table: ListTable = field(default_factory=ListTable)
    load: PolicyLoader = load_fake
    config: ServiceConfig = field(default_factory=ServiceConfig)
    server: SingleServer | None = None
    port: int = 0

    def start(self) -> None:
        ingest = FleetIngest(self.table, SPEC, IngestConfig(num_steps=8))
        service = build_service(self.registry, load=self.load, config=self.config)
        self.server = SingleServer(service, ingest=ingest, port=self.port).start()
        self.port = self.server.port

    def kill(self) -> None:
        if self.server is not None:
            self.server.close()
            self.server = None


@pytest.fixture
def make_site() -> Iterator[Callable[..., Site]]:
    sites: list[Site] = []

    def make(**settings: object) -> Site:
        site = Site(**settings)  # type: ignore[arg-type]
        sites.append(site)
        site.registry.publish(fake_artifact(SPEC, bias=0.05), channel="stable")
        site.start()
        return site

    yield make
    for site in sites:
        site.kill()


@pytest.fixture
def site(make_site: Callable[..., Site]) -> Site:
    return make_site()


@pytest.fixture
def client(site: Site) -> Iterator[PolicyClient]:
    with PolicyClient(f"127.0.0.1:{site.port}", timeout_s=5.0, reconnect=RECONNECT) as client:
        yield client
