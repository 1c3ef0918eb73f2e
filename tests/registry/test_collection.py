import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from vla_dist.core.errors import ConfigError, NotFound
from vla_dist.registry import store as store_module
from vla_dist.registry.blobs import DirectoryBlobs, RedisBlobs
from vla_dist.registry.collection import CollectionConfig, collect, judge

FEW = CollectionConfig(keep_newest=1, min_age_s=0.0)


@pytest.fixture(params=["redis", "directory"])
def registry(request, make_registry, url, tmp_path):
    return make_registry(blobs=RedisBlobs(url) if request.param == "redis" else DirectoryBlobs(tmp_path / "blobs"))


@pytest.fixture
def make_artifact(make_artifact, name):
    """Tensors that no other test has: in one Redis equal ones are shared."""

    def make(value):
        artifact = make_artifact(value)
        salt = np.frombuffer(name.encode(), np.uint8)
        return replace(artifact, tensors={**artifact.tensors, "salt": salt})

    return make


def reasons(registry, name, config=FEW):
    return {verdict.manifest.version: verdict.reason for verdict in judge(registry, name, config)}


def test_what_channels_followers_and_the_newest_need_stays(registry, make_registry, make_artifact, name):
    for value in range(1, 7):
        registry.publish(make_artifact(value))
    registry.set_channel(name, "stable", 2)
    registry.set_channel(name, "canary", 4)
    follower = make_registry(blobs=registry.blobs)
    follower.follow(f"{name}@stable", after=3, timeout_s=0.05)
    expected = {
        1: "",
        2: "channel stable",
        3: "in use by a follower",
        4: "channel canary",
        5: "",
        6: "among the newest 1",
    }
    assert reasons(registry, name) == expected
    given_up, freed = collect(registry, [name], FEW)
    assert given_up == [f"{name}@1", f"{name}@5"]
    assert freed == sum(m.num_bytes for m in registry.manifests(name) if m.version in (1, 5))
    assert [m.version for m in registry.manifests(name)] == [1, 2, 3, 4, 5, 6]
    for version in (2, 3, 4, 6):
        assert registry.fetch(name, version).tensors["bias"][0] == version
    with pytest.raises(NotFound, match="removed to free space"):
        registry.fetch(name, 1)
    with pytest.raises(NotFound, match="removed to free space"):
        registry.set_channel(name, "stable", 5)
    assert registry.publish(make_artifact(9)) == 7
    assert collect(registry, [name], replace(FEW, keep_newest=2)) == ([], 0)


def test_a_lease_that_ended_holds_nothing(registry, make_artifact, name, monkeypatch):
    for value in range(2):
        registry.publish(make_artifact(value))
    monkeypatch.setattr(store_module, "_LEASE_S", 1.0)
    registry.follow(f"{name}@stable", after=1, timeout_s=0.01)
    assert reasons(registry, name)[1] == "in use by a follower"
    time.sleep(1.1)
    assert reasons(registry, name)[1] == ""


def test_young_versions_stay(registry, make_artifact, name):
    for value in range(2):
        registry.publish(make_artifact(value))
    assert reasons(registry, name, CollectionConfig(keep_newest=1))[1] == "young"
    assert collect(registry, [name], CollectionConfig(keep_newest=1)) == ([], 0)


def test_tensors_that_two_versions_share_stay_until_both_may_go(registry, make_artifact, name):
    for value in (1.0, 2.0, 1.0):
        registry.publish(make_artifact(value))
    assert collect(registry, [name], FEW)[0] == [f"{name}@1", f"{name}@2"]
    assert len(registry.blobs.get(registry.manifests(name)[2].tensors_sha256)) > 0
    registry.publish(make_artifact(4.0))
    assert collect(registry, [name], FEW) == ([f"{name}@3"], registry.manifests(name)[2].num_bytes)


def test_a_killed_collection_is_finished_by_the_next(registry, make_artifact, name):
    for value in range(2):
        registry.publish(make_artifact(value))
    assert registry.retire(name, [1]) == [1]
    assert registry.blobs.get(registry.manifests(name)[0].tensors_sha256), "given up, not yet removed"
    assert collect(registry, [name], FEW) == ([], registry.manifests(name)[0].num_bytes)


def test_publishers_wait_and_are_spared(registry, make_artifact, name):
    registry.publish(make_artifact(1.0))
    versions = []
    publisher = threading.Thread(target=lambda: versions.append(registry.publish(make_artifact(2.0))))
    digest = registry.manifests(name)[0].tensors_sha256
    with registry.collecting() as being_published:
        assert digest not in being_published
        publisher.start()
        time.sleep(0.3)
        assert versions == []
        with pytest.raises(ConfigError, match="somebody else"), registry.collecting():
            pass
    publisher.join(timeout=10)
    assert versions == [2]
    registry._announce(f"{digest}:someone", time.monotonic() + 1)
    registry.retire(name, [1])
    assert collect(registry, [name], FEW)[1] == 0
    assert registry.blobs.get(digest)


def test_a_storm_of_publishers_and_collectors_loses_no_version_that_is_needed(make_registry, make_artifact, name, url):
    """Equal bytes come and go: a publisher that finds them there must not see them vanish."""
    errors, stop = [], threading.Event()

    def publish():
        registry = make_registry()
        for count in range(20):
            try:
                version = registry.publish(make_artifact(float(count % 2)), channel="stable")
                registry.fetch(name, version)
            except Exception as error:
                errors.append(error)
        stop.set()

    def clear():
        registry = make_registry()
        while not stop.is_set():
            try:
                collect(registry, [name], FEW)
            except ConfigError:
                pass
            except Exception as error:
                errors.append(error)
            time.sleep(0.05)

    threads = [threading.Thread(target=publish), threading.Thread(target=clear)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert errors == []


def test_settings_that_would_remove_everything_are_refused():
    with pytest.raises(ConfigError, match="at least 1"):
        CollectionConfig(keep_newest=0)
