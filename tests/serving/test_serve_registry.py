"""Ray Serve on a real registry: channels moved through it, Redis killed under it, and hostile messages against it."""

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import ray
from ray import cloudpickle

from vla_dist.core.errors import Forbidden, MoveRefused
from vla_dist.registry.blobs import RedisBlobs
from vla_dist.registry.canaries import RedisCanaries
from vla_dist.registry.promotion import Promotion
from vla_dist.registry.sequential import CanaryRule
from vla_dist.registry.store import RedisPolicyRegistry
from vla_dist.replay.server import EmbeddedServer
from vla_dist.robot.client import PolicyClient
from vla_dist.serving.assignment import ChannelAssignment
from vla_dist.serving.authorisation import AccessConfig, create_token
from vla_dist.serving.batcher import BatcherConfig, DeadlineBatcher
from vla_dist.serving.channel_client import ChannelClient
from vla_dist.serving.event_log import read_events
from vla_dist.serving.ingest import FleetIngest, IngestConfig
from vla_dist.serving.service import PolicyService
from vla_dist.serving.service_config import ServiceConfig
from vla_dist.serving.versions import PolicyVersions
from vla_dist.testing import hostile
from vla_dist.testing.attack import Bystander, attack
from vla_dist.testing.fakes import FakeEnv
from vla_dist.testing.registry import fake_artifact, load_fake
from vla_dist.testing.serving import BUCKETS, REFERENCE, VERSIONS, ListTable

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own settings use a spelling that pydantic deprecates
    from vla_dist.run.serve_app import ServingHandle, apply_serving_environment, start_serving

SPEC = hostile.SPEC

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.chaos,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore"),  # Ray leaves files and sockets to the garbage collector
]


@dataclass
class Fleet:
    """A served registry: its store may be killed and started again."""

    serving: ServingHandle
    store: EmbeddedServer
    folder: Path
    tokens: dict[str, str]

    def client(self, role: str = "operator") -> PolicyClient:
        return PolicyClient(self.serving.address, token=self.tokens[role], timeout_s=20.0)

    def registry(self) -> RedisPolicyRegistry:
        return RedisPolicyRegistry(self.store.url, RedisBlobs(self.store.url))

    def replica_pids(self) -> list[int]:
        children = psutil.Process().children(recursive=True)
        return [child.pid for child in children if "ServeReplica" in child.name()]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    store = EmbeddedServer(folder / "redis")
    url = store.url
    registry = RedisPolicyRegistry(url, RedisBlobs(url))
    registry.publish(fake_artifact(SPEC, bias=0.1), channel="stable")
    registry.publish(fake_artifact(SPEC, bias=0.2))
    registry.close()
    tokens = {role: create_token(folder / "tokens.json", name=role, role=role) for role in ("operator", "admin")}

    def build() -> tuple[PolicyService, FleetIngest]:
        registry, canaries = RedisPolicyRegistry(url, RedisBlobs(url)), RedisCanaries(url)
        versions = PolicyVersions(registry, load_fake, VERSIONS)
        versions.start()
        service = PolicyService(
            versions,
            DeadlineBatcher(BatcherConfig(bucket_sizes=BUCKETS)),
            ServiceConfig(),
            key=canaries.service_key(),
            assignment=ChannelAssignment(versions, canaries, poll_s=0.1).start(),
            moves=Promotion(registry, canaries),
        )
        return service, FleetIngest(ListTable(), SPEC, IngestConfig(num_steps=8))

    before = dict(os.environ)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    apply_serving_environment()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20)
    access = AccessConfig(tokens_file=folder / "tokens.json", audit=folder / "audit.jsonl")
    try:
        with start_serving(build, port=0, num_replicas=1, num_cpus=0.5, access=access) as serving:
            fleet = Fleet(serving, store, folder, tokens)
            yield fleet
            fleet.store.close()
    finally:
        ray.shutdown()
        os.environ.clear()
        os.environ.update(before)
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def test_channels_are_moved_through_serve_by_role(fleet: Fleet) -> None:
    observation = FakeEnv(SPEC).reset(seed=0, task="go").observation
    with fleet.client("operator") as looking, fleet.client("admin") as moving:
        operator = ChannelClient(looking.channel, address=looking.address, metadata=looking.call_metadata)
        admin = ChannelClient(moving.channel, address=moving.address, metadata=moving.call_metadata)
        with pytest.raises(Forbidden, match="needs 'admin'"):
            operator.promote("demo@2", force="now", who="eve")
        with pytest.raises(MoveRefused, match="no canary of it runs"):
            admin.promote("demo@2", who="anna")
        admin.begin_canary("demo@2", share=1.0, rule=CanaryRule(), who="anna")
        until(lambda: ("demo", 2) in looking.health().loaded, "the canary was not loaded")
        with looking.open_session(SPEC, policy=REFERENCE, robot_id="r") as session:
            assert session.act(observation, deadline_s=20.0).policy_version == 2
            assert session.grant.channel == "canary"
        admin.roll_back("demo", reason="enough seen", who="anna")
        assert operator.reports()[0].channels == {"stable": 1, "canary": 1}
        assert [entry["event"] for entry in operator.audit(10)] == ["refused", "canary", "rolled_back"]
    assert "needs 'admin'" in read_events(fleet.folder / "audit.jsonl")[0]["reason"]


def test_robots_do_not_notice_that_redis_is_killed_under_serve(fleet: Fleet) -> None:
    stop, failures, counts = threading.Event(), [], [0] * 4

    def robot(index: int) -> None:
        env = FakeEnv(SPEC)
        with fleet.client() as client:
            while not stop.is_set():
                try:
                    with client.open_session(SPEC, policy=REFERENCE, robot_id=f"r{index}") as session:
                        step = env.reset(seed=index, task="go")
                        while not step.is_last:
                            step = env.step(session.act(step.observation, deadline_s=30.0).actions[0])
                            counts[index] += 1
                        failures.extend([session.metrics()] if session.metrics()["failures"] else [])
                except Exception as error:
                    failures.append(error)
                    return

    robots = [threading.Thread(target=robot, args=(index,)) for index in range(4)]
    for thread in robots:
        thread.start()
    try:
        until(lambda: min(counts) > 5, "the robots did not begin")
        os.kill(fleet.store.pid, signal.SIGKILL)
        with fleet.client() as client:
            until(lambda: any("stays at version 1" in p for p in client.health().problems), "health said nothing")
            so_far = list(counts)
            until(lambda: all(now > then + 50 for now, then in zip(counts, so_far, strict=True)), "robots stopped")
            fleet.store.close()
            fleet.store = EmbeddedServer(fleet.folder / "redis")
            until(lambda: client.health().problems == (), "the replica did not find Redis again")
            registry = fleet.registry()
            version = registry.publish(fake_artifact(SPEC, bias=0.3), channel="stable")
            registry.close()
            until(lambda: ("demo", version) in client.health().loaded, "no version came after the outage")
    finally:
        stop.set()
        for thread in robots:
            thread.join(60)
    assert failures == []


def test_hostile_messages_through_serve_hurt_nobody(fleet: Fleet) -> None:
    token = fleet.tokens["operator"]
    attack(fleet.serving.address, num_unary=200, num_streams=20, seed=0, token=token)
    (pid,) = fleet.replica_pids()
    before = psutil.Process(pid).memory_info().rss
    with Bystander(fleet.serving.address, token=token) as bystander:
        codes = attack(fleet.serving.address, num_unary=9000, num_streams=2500, seed=1, token=token)
    assert fleet.replica_pids() == [pid], "the replica died"
    grown = psutil.Process(pid).memory_info().rss - before
    assert bystander.failures == []
    assert bystander.num_answers > 5
    assert grown < 60 * 2**20, f"{grown / 2**20:.0f} MiB more after {sum(codes.values())} calls"
    with fleet.client() as client:
        until(lambda: client.health().num_sessions == 0, "sessions were left behind")
