"""Redis is killed: robots that have a policy keep it, new episodes begin, and the service says what it cannot know."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

from vla_dist.registry.blobs import RedisBlobs
from vla_dist.registry.canaries import RedisCanaries
from vla_dist.registry.store import RedisPolicyRegistry
from vla_dist.replay.server import EmbeddedServer
from vla_dist.robot.client import PolicyClient
from vla_dist.serving.assignment import ChannelAssignment
from vla_dist.serving.batcher import BatcherConfig, DeadlineBatcher
from vla_dist.serving.server import SingleServer
from vla_dist.serving.service import PolicyService
from vla_dist.serving.service_config import ServiceConfig
from vla_dist.serving.versions import PolicyVersions
from vla_dist.testing.fakes import FakeEnv, make_spec
from vla_dist.testing.registry import fake_artifact, load_fake
from vla_dist.testing.serving import BUCKETS, REFERENCE, VERSIONS

SPEC = make_spec()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def test_robots_do_not_notice_that_redis_died(tmp_path: Path) -> None:
    store = EmbeddedServer(tmp_path / "redis")
    registry, canaries = RedisPolicyRegistry(store.url, RedisBlobs(store.url)), RedisCanaries(store.url)
    registry.publish(fake_artifact(SPEC, bias=0.1), channel="stable")
    versions = PolicyVersions(registry, load_fake, VERSIONS)
    versions.start()
    assignment = ChannelAssignment(versions, canaries, poll_s=0.05).start()
    batcher = DeadlineBatcher(BatcherConfig(bucket_sizes=BUCKETS))
    service = PolicyService(versions, batcher, ServiceConfig(), key=canaries.service_key(), assignment=assignment)
    observation = FakeEnv(SPEC).reset(seed=0, task="go").observation
    with SingleServer(service) as server, PolicyClient(server.address) as client:
        session = client.open_session(SPEC, policy=REFERENCE, robot_id="r")
        first = session.act(observation, deadline_s=2.0)
        os.kill(store.pid, signal.SIGKILL)
        until(lambda: not psutil.pid_exists(store.pid) or not store.alive)
        for _ in range(50):
            assert session.act(observation, deadline_s=2.0).policy_version == first.policy_version
        with client.open_session(SPEC, policy=REFERENCE, robot_id="r2") as another:
            assert np.isfinite(another.act(observation, deadline_s=2.0).actions).all()
        until(lambda: any("demo@stable stays at version 1" in problem for problem in client.health().problems))
        session.close(outcome="success", episode_id="e1")
        store.close()
        again = EmbeddedServer(tmp_path / "redis")
        until(lambda: client.health().problems == ())
        registry.publish(fake_artifact(SPEC, bias=0.2), channel="stable")
        until(lambda: ("demo", 2) in client.health().loaded)
    registry.close()
    canaries.close()
    again.close()
