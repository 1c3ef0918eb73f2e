"""A new version is ready before it is given out, a broken one never is, and an old one leaves with its last session."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from vla_dist.core.errors import ConfigError, DataError, IntegrityError, NotFound, ResourceMissing
from vla_dist.core.types import PolicyArtifact
from vla_dist.serving.versions import PolicyVersions, VersionsConfig, warm_up
from vla_dist.testing.fakes import FakePolicy, make_spec
from vla_dist.testing.registry import InMemoryRegistry, fake_artifact, load_fake
from vla_dist.testing.serving import REFERENCE, VERSIONS

SPEC = make_spec()


class WatchedLoader:
    """Counts loads, can be held up, and sees the batches of what it built."""

    def __init__(self) -> None:
        self.loads: list[int] = []
        self.batches: list[int] = []
        self.may_load = threading.Event()
        self.may_load.set()

    def __call__(self, artifact: PolicyArtifact) -> FakePolicy:
        assert self.may_load.wait(10)
        self.loads.append(artifact.manifest.version)
        if artifact.manifest.config.get("broken"):
            raise IntegrityError("the tensors are broken")
        policy = load_fake(artifact)
        act = policy.act

        def watched(observations, states, *, generator=None):  # type: ignore[no-untyped-def]
            self.batches.append(len(observations))
            return act(observations, states, generator=generator)

        policy.act = watched  # type: ignore[method-assign]
        return policy


@pytest.fixture
def registry() -> InMemoryRegistry:
    registry = InMemoryRegistry()
    registry.publish(fake_artifact(SPEC, bias=1.0), channel="stable")
    return registry


@pytest.fixture
def loader() -> WatchedLoader:
    return WatchedLoader()


@pytest.fixture
def versions(registry: InMemoryRegistry, loader: WatchedLoader) -> Iterator[PolicyVersions]:
    versions = PolicyVersions(registry, loader, VERSIONS)
    versions.start()
    yield versions
    versions.close()


def wait_until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def test_the_old_version_serves_until_the_new_one_is_ready(
    versions: PolicyVersions, registry: InMemoryRegistry, loader: WatchedLoader
) -> None:
    loader.may_load.clear()
    registry.publish(fake_artifact(SPEC, bias=2.0), channel="stable")
    time.sleep(0.15)
    session = versions.acquire(REFERENCE)
    assert session.version == 1
    loader.may_load.set()
    wait_until(lambda: versions.current()[REFERENCE] == 2)
    assert versions.sessions() == {("demo", 1): 1, ("demo", 2): 0}
    versions.release(session)
    assert versions.sessions() == {("demo", 2): 0}


def test_a_version_is_warm_before_its_first_robot(versions: PolicyVersions, loader: WatchedLoader) -> None:
    versions.acquire(REFERENCE)
    assert loader.batches == [1, 2]


def test_no_part_of_making_a_version_ready_begins_while_a_robot_waits(
    registry: InMemoryRegistry, loader: WatchedLoader
) -> None:
    done_before: list[tuple[int, int]] = []

    def wait_until_idle(timeout_s: float) -> bool:
        done_before.append((len(loader.loads), len(loader.batches)))
        return True

    versions = PolicyVersions(registry, loader, VERSIONS, wait_until_idle=wait_until_idle)
    versions.start()
    versions.close()
    assert done_before == [(0, 0), (1, 0)]
    assert (len(loader.loads), len(loader.batches)) == (1, 2)


def test_a_session_can_ask_for_the_version_it_began_with(
    versions: PolicyVersions, registry: InMemoryRegistry, loader: WatchedLoader
) -> None:
    registry.publish(fake_artifact(SPEC), channel="stable")
    wait_until(lambda: versions.current()[REFERENCE] == 2)
    assert not versions.is_loaded(REFERENCE, 1)
    session = versions.acquire(REFERENCE, 1)
    assert session.version == 1
    assert loader.loads == [1, 2, 1]
    versions.release(session)
    assert ("demo", 1) not in versions.sessions()


def test_a_broken_version_is_never_served_and_is_named(versions: PolicyVersions, registry: InMemoryRegistry) -> None:
    good = fake_artifact(SPEC)
    broken = PolicyArtifact(
        manifest=type(good.manifest)(name="demo", architecture="fake", config={"broken": True}, spec=SPEC, horizon=1),
        tensors=good.tensors,
    )
    registry.publish(broken, channel="stable")
    wait_until(lambda: bool(versions.problems()))
    assert versions.current()[REFERENCE] == 1
    assert "stays at version 1: the tensors are broken" in versions.problems()[0]
    registry.publish(good, channel="stable")
    wait_until(lambda: versions.current()[REFERENCE] == 3)
    wait_until(lambda: not versions.problems())


def test_rollback_is_a_flip_like_any_other(versions: PolicyVersions, registry: InMemoryRegistry) -> None:
    registry.publish(fake_artifact(SPEC), channel="stable")
    wait_until(lambda: versions.current()[REFERENCE] == 2)
    registry.set_channel("demo", "stable", 1)
    wait_until(lambda: versions.current()[REFERENCE] == 1)


def test_memory_is_bounded(versions: PolicyVersions, registry: InMemoryRegistry) -> None:
    for _ in range(6):
        registry.publish(fake_artifact(SPEC))
    held = [versions.acquire(REFERENCE, version) for version in (1, 2, 3, 4, 5)]
    with pytest.raises(ResourceMissing, match="5 versions are loaded"):
        versions.acquire(REFERENCE, 6)
    versions.release(held[1])
    assert versions.acquire(REFERENCE, 6).version == 6


def test_only_followed_references_are_served(versions: PolicyVersions) -> None:
    with pytest.raises(NotFound, match=r"demo@canary.*this server has demo@stable"):
        versions.acquire("demo@canary")
    with pytest.raises(NotFound, match="no version 9"):
        versions.acquire(REFERENCE, 9)


def test_a_crowd_loads_a_version_once(
    versions: PolicyVersions, registry: InMemoryRegistry, loader: WatchedLoader
) -> None:
    registry.publish(fake_artifact(SPEC))
    threads = [threading.Thread(target=versions.acquire, args=(REFERENCE, 2)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert loader.loads == [1, 2]
    assert versions.sessions()["demo", 2] == 8


class WrongPolicy(FakePolicy):
    """Promises three actions a chunk and gives one."""

    @property
    def horizon(self) -> int:
        return 3

    @horizon.setter
    def horizon(self, value: int) -> None:
        pass

    def act(self, observations, states, *, generator=None):  # type: ignore[no-untyped-def]
        chunks, states = super().act(observations, states)
        return [chunk[:1] for chunk in chunks], states


@pytest.mark.parametrize(
    ("policy", "words"),
    [(WrongPolicy(SPEC), r"chunks of .*\(1, 2\).* expected 2 float32"), (FakePolicy(SPEC, bias=np.inf), "not finite")],
    ids=["shape", "finite"],
)
def test_warm_up_finds_broken_promises(policy: FakePolicy, words: str) -> None:
    with pytest.raises(DataError, match=words):
        warm_up(policy, (2,))


def test_only_a_version_of_another_kind_is_warmed_up_at_every_size(
    registry: InMemoryRegistry, loader: WatchedLoader, versions: PolicyVersions
) -> None:
    """Every batch of a warm-up takes time from robots that run."""
    assert loader.batches == [1, 2]
    versions.keep("twin", "demo", registry.publish(fake_artifact(SPEC, bias=2.0)))
    assert loader.batches == [1, 2, 1]
    versions.keep("other", "demo", registry.publish(fake_artifact(SPEC, horizon=3)))
    assert loader.batches == [1, 2, 1, 1, 2]
    other = fake_artifact(SPEC, bias=3.0)
    manifest = replace(other.manifest, config={"model": {"width": 8}})
    versions.keep("wider", "demo", registry.publish(replace(other, manifest=manifest)))
    assert loader.batches == [1, 2, 1, 1, 2, 1, 2]


@pytest.mark.parametrize("settings", [{"references": ()}, {"references": ("demo",)}, {"max_loaded": 1}])
def test_settings_are_checked(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        VersionsConfig(**({"references": (REFERENCE,)} | settings))  # type: ignore[arg-type]
