import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import redis

from vla_dist.core.errors import ConfigError, DataError, IntegrityError, NotFound, Unauthorised, Unreachable
from vla_dist.registry import store as store_module
from vla_dist.registry.blobs import DirectoryBlobs, RedisBlobs
from vla_dist.replay.server import EmbeddedServer


@pytest.fixture(params=["redis", "directory"])
def either_registry(request, make_registry, url, tmp_path):
    return make_registry(blobs=RedisBlobs(url) if request.param == "redis" else DirectoryBlobs(tmp_path / "blobs"))


def test_what_was_published_is_fetched(either_registry, name, make_artifact):
    artifact = make_artifact(
        1.5, config={"hidden_dim": 8, "layers": [1, 2]}, metrics={"loss": 0.25}, parent=3, git_revision="abc"
    )
    assert either_registry.publish(artifact) == 1
    fetched = either_registry.fetch(name, 1)
    assert set(fetched.tensors) == {"bias", "steps"}
    for key, tensor in artifact.tensors.items():
        np.testing.assert_array_equal(fetched.tensors[key], tensor)
        assert fetched.tensors[key].dtype == tensor.dtype
    manifest = fetched.manifest
    assert manifest.version == 1
    assert len(manifest.tensors_sha256) == 64
    assert manifest.num_bytes > 4 + 48
    assert abs(manifest.created_unix_s - time.time()) < 60
    assigned = {name: getattr(manifest, name) for name in ("version", "tensors_sha256", "num_bytes", "created_unix_s")}
    assert manifest == replace(artifact.manifest, **assigned)


def test_versions_count_from_one_by_name(registry, name, make_artifact):
    assert [registry.publish(make_artifact(value)) for value in (1.0, 2.0, 2.0)] == [1, 2, 3]
    assert registry.publish(make_artifact(name=f"{name}-b"[-64:])) == 1
    assert [m.version for m in registry.manifests(name)] == [1, 2, 3]
    assert registry.fetch(name, 2).tensors["bias"] == 2.0
    assert name in registry.names()
    assert registry.manifests("unknown") == []


def test_more_than_nine_versions_are_in_order(registry, name, make_artifact):
    for value in range(12):
        registry.publish(make_artifact(value))
    assert [m.version for m in registry.manifests(name)] == list(range(1, 13))


def test_publishers_at_the_same_time_get_versions_of_their_own(registry, make_registry, name, make_artifact):
    found = {}

    def publish_ten(publisher, own_registry):
        for number in range(10):
            value = 1000 * publisher + number
            found[value] = own_registry.publish(make_artifact(value), channel="latest")

    threads = [threading.Thread(target=publish_ten, args=(p, make_registry())) for p in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found.values()) == list(range(1, 41))
    for value, version in found.items():
        assert registry.fetch(name, version).tensors["bias"] == value
    moves = registry.history(name)
    assert [move.version for move in moves] == list(range(1, 41)), "the channel never moved backwards"
    assert [move.previous for move in moves] == list(range(40))


def test_threads_may_share_a_registry(registry, name, make_artifact):
    versions = []
    threads = [
        threading.Thread(target=lambda v=v: versions.append(registry.publish(make_artifact(v)))) for v in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(versions) == list(range(1, 9))


@pytest.mark.parametrize("config", [{"layers": [1, 2]}, {"layers": (1, 2)}], ids=["lists", "tuples"])
def test_a_publication_whose_answer_was_lost_is_not_repeated(registry, name, make_artifact, monkeypatch, config):
    publish, lost = registry._try_publish, []

    def lose_first(*args):
        version = publish(*args)
        if not lost:
            lost.append(version)
            raise redis.ConnectionError("the answer was lost on its way")
        return version

    monkeypatch.setattr(registry, "_try_publish", lose_first)
    assert registry.publish(make_artifact(config=config), channel="stable") == 1
    assert lost == [1]
    assert len(registry.manifests(name)) == len(registry.history(name)) == 1


def test_a_channel_moves_and_keeps_its_history(registry, name, make_artifact):
    registry.publish(make_artifact(1.0), channel="stable")
    registry.publish(make_artifact(2.0), channel="canary")
    assert registry.resolve(f"{name}@stable") == 1
    assert registry.resolve(f"{name}@canary") == registry.resolve(f"{name}@2") == 2
    registry.set_channel(name, "stable", 2)
    registry.set_channel(name, "stable", 1)
    assert registry.channels(name) == {"canary": 2, "stable": 1}
    assert [(m.channel, m.previous, m.version) for m in registry.history(name)] == [
        ("stable", 0, 1),
        ("canary", 0, 2),
        ("stable", 1, 2),
        ("stable", 2, 1),
    ]
    times = [m.unix_s for m in registry.history(name)]
    assert times == sorted(times)


def test_a_channel_cannot_point_at_nothing(registry, name, make_artifact):
    registry.publish(make_artifact(), channel="stable")
    with pytest.raises(NotFound, match=f"has no '2'.*{name}@"):
        registry.set_channel(name, "stable", 2)
    assert registry.resolve(f"{name}@stable") == 1


def test_what_is_not_found_names_its_neighbours(registry, make_artifact):
    registry.publish(make_artifact(name="drawer-opener"), channel="stable")
    registry.publish(make_artifact(name="drawer-opener"), channel="canary")
    with pytest.raises(NotFound, match="no policy 'drawer-openr'; nearest: drawer-opener"):
        registry.resolve("drawer-openr@stable")
    with pytest.raises(NotFound, match="has no 'stabel'; nearest: drawer-opener@stable"):
        registry.resolve("drawer-opener@stabel")
    with pytest.raises(NotFound, match=r"has no '9'.*drawer-opener@2"):
        registry.fetch("drawer-opener", 9)


@pytest.mark.parametrize("reference", ["", "name", "name@", "@stable", "a b@stable", "name@st/able"])
def test_a_reference_is_name_at_target(registry, reference):
    with pytest.raises(ConfigError, match=r"name@channel or name@17"):
        registry.resolve(reference)


def test_names_and_channels_must_be_plain(registry, name, make_artifact):
    with pytest.raises(ConfigError, match="policy name 'a b'"):
        registry.publish(make_artifact(name="a b"))
    with pytest.raises(ConfigError, match="channel '7' would read as a version"):
        registry.publish(make_artifact(), channel="7")
    with pytest.raises(DataError, match="not plain JSON"):
        registry.publish(make_artifact(config={"rate": float("nan")}))
    assert registry.manifests(name) == [], "nothing of it was stored"


def test_a_follower_wakes_quickly(registry, make_registry, name, make_artifact, monkeypatch):
    # Woken by the message alone: looking again would take longer than the test allows.
    monkeypatch.setattr(store_module, "_RECHECK_S", 30.0)
    registry.publish(make_artifact(), channel="stable")
    moved = []

    def move():
        registry.publish(make_artifact(2.0))
        moved.append(time.monotonic())
        registry.set_channel(name, "stable", 2)

    mover = threading.Timer(0.3, move)
    mover.start()
    assert make_registry().follow(f"{name}@stable", after=1, timeout_s=10.0) == 2
    assert time.monotonic() - moved[0] < 1.0
    mover.join()


def test_a_follower_waits_for_what_does_not_exist_yet(registry, make_registry, name, make_artifact):
    publisher = threading.Timer(0.2, registry.publish, args=(make_artifact(),), kwargs={"channel": "stable"})
    publisher.start()
    assert make_registry().follow(f"{name}@stable", after=0, timeout_s=10.0) == 1
    publisher.join()


def test_a_follower_times_out_with_what_it_had(registry, name, make_artifact):
    registry.publish(make_artifact(), channel="stable")
    start = time.monotonic()
    assert registry.follow(f"{name}@stable", after=1, timeout_s=0.3) == 1
    assert 0.3 <= time.monotonic() - start < 1.5
    assert registry.follow(f"{name}@stable", after=7, timeout_s=0.3) == 1, "another version, older or newer, is news"
    assert registry.follow("nobody@stable", after=0, timeout_s=0.1) == 0


def test_damaged_tensors_are_not_loaded(registry, url, name, make_artifact):
    registry.publish(make_artifact(17.25))
    key = "{registry}:blob:" + registry.manifests(name)[0].tensors_sha256
    with redis.Redis.from_url(url) as client:
        client.setrange(key, client.strlen(key) - 1, b"\x7f")
    with pytest.raises(IntegrityError, match="damaged or tampered with"):
        registry.fetch(name, 1)
    with redis.Redis.from_url(url) as client:
        client.unlink(key)
    with pytest.raises(NotFound, match="no tensors"):
        registry.fetch(name, 1)


def test_a_damaged_manifest_is_refused(registry, url, name, make_artifact):
    registry.publish(make_artifact())
    with redis.Redis.from_url(url) as client:
        client.hset("{registry}:manifests:" + name, "1", b'{"name": "x"}')
    with pytest.raises(IntegrityError, match="not a policy manifest"):
        registry.fetch(name, 1)


def test_a_restart_keeps_everything(make_registry, tmp_path, name, make_artifact):
    with EmbeddedServer(tmp_path / "s") as first:
        registry = make_registry(url=first.url)
        registry.publish(make_artifact(4.0), channel="stable")
        registry.publish(make_artifact(5.0), channel="canary")
        history = registry.history(name)
        first._kill()
    with EmbeddedServer(tmp_path / "s") as second:
        assert second.url == first.url
        assert registry.fetch(name, 1).tensors["bias"] == 4.0
        assert registry.channels(name) == {"canary": 2, "stable": 1}
        assert registry.history(name) == history
        assert registry.publish(make_artifact(6.0)) == 3


def test_a_follower_outlives_a_restart(make_registry, tmp_path, name, make_artifact):
    with EmbeddedServer(tmp_path / "s") as first:
        follower = make_registry(url=first.url)
        follower.publish(make_artifact(), channel="stable")
        found = []
        thread = threading.Thread(
            target=lambda: found.append(follower.follow(f"{name}@stable", after=1, timeout_s=20.0))
        )
        thread.start()
        time.sleep(0.2)
        first._kill()
    with EmbeddedServer(tmp_path / "s"):
        make_registry(url=first.url).publish(make_artifact(2.0), channel="stable")
        thread.join(15)
    assert found == [2]


def test_no_server_and_no_entry_are_named(make_registry, server, tmp_path, make_artifact, monkeypatch):
    monkeypatch.setattr(store_module, "_PUBLISH_TIMEOUT_S", 0.2)
    nowhere = make_registry(url=f"unix://{tmp_path}/nothing.sock", blobs=DirectoryBlobs(tmp_path))
    for call in (
        lambda: nowhere.resolve("a@stable"),
        lambda: nowhere.publish(make_artifact()),
        lambda: nowhere.follow("a@stable", after=0, timeout_s=0.2),
    ):
        start = time.monotonic()
        with pytest.raises(Unreachable, match="does not answer"):
            call()
        assert time.monotonic() - start < 8.0
    stranger = make_registry(url=f"unix://client:guess@{server.directory}/server.sock", blobs=DirectoryBlobs(tmp_path))
    with pytest.raises(Unauthorised, match="refuses this user"):
        stranger.resolve("a@stable")
    with pytest.raises(ConfigError, match="not a Redis URL"):
        make_registry(url="http://x", blobs=DirectoryBlobs(tmp_path))
