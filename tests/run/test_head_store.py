"""The head's two servers: they outlive a kill and a short absence of Ray, and go with it when it stays away."""

import os
import signal
import socket
import time

import psutil
import pytest
import redis

from vla_dist.core.errors import ConfigError, NotFound, ResourceMissing
from vla_dist.run.head_store import HeadStoreConfig, ensure_store, find_store
from vla_dist.run.serve_app import free_ports

# It outlives whoever starts it, and Python says so when that object goes.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


def wait_for(condition, *, timeout_s=20.0):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_gone(folder):
    try:
        find_store(folder)
    except NotFound:
        return True
    return False


@pytest.fixture
def config(tmp_path):
    replay, ray, gcs = free_ports(3)
    folder = tmp_path / "store"
    yield HeadStoreConfig(
        folder=folder, host="127.0.0.1", replay_port=replay, ray_port=ray, gcs_port=gcs, grace_s=3.0, max_memory_gib=1.0
    )
    if not is_gone(folder):
        os.kill(find_store(folder).pid, signal.SIGTERM)
        wait_for(lambda: is_gone(folder))


@pytest.mark.slow
def test_a_killed_server_comes_back_with_its_data_and_both_end_when_ray_stays_away(config):
    store = ensure_store(config)
    assert ensure_store(config) == store
    assert (config.folder / "addresses.json").stat().st_mode & 0o077 == 0
    with redis.Redis.from_url(store.replay_url) as replay, redis.Redis.from_url(store.ray_url) as ray_store:
        replay.set("key", "kept")
        ray_store.set("key", "apart")
        with socket.create_server(("127.0.0.1", config.gcs_port)):  # Ray is there.
            port = f":{config.replay_port}"
            (server,) = [one for one in psutil.Process(store.pid).children() if port in " ".join(one.cmdline())]
            server.kill()
            time.sleep(config.grace_s + 1.0)
            wait_for(lambda: not is_gone(config.folder))
            assert replay.get("key") == b"kept"
            assert ray_store.get("key") == b"apart"
        # Ray is away, and back in time.
        time.sleep(1.0)
        with socket.create_server(("127.0.0.1", config.gcs_port)):
            time.sleep(config.grace_s)
            assert find_store(config.folder) == store
    wait_for(lambda: is_gone(config.folder))
    assert psutil.Process(store.pid).wait(timeout=20) is not None
    assert (config.folder / "replay" / "appendonlydir").is_dir()
    assert not (config.folder / "ray").exists()


@pytest.mark.slow
def test_a_taken_port_is_said_by_whoever_starts(config):
    with (
        socket.create_server(("127.0.0.1", config.replay_port)),
        pytest.raises(ResourceMissing, match="ended while it started"),
    ):
        ensure_store(config)


def test_settings_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="must differ"):
        HeadStoreConfig(folder=tmp_path, host="127.0.0.1", replay_port=6379)
    with pytest.raises(ConfigError, match="would lose its state"):
        HeadStoreConfig(folder=tmp_path, host="127.0.0.1", grace_s=0)
