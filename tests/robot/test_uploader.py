"""Every segment arrives once, whatever happens on the way, and the robot never waits for the network unasked."""

from collections.abc import Iterator

import pytest

from vla_dist.core.errors import ConfigError, ReplayWait, Unreachable, WaitTimeout
from vla_dist.core.types import Segment
from vla_dist.robot.client import PolicyClient
from vla_dist.robot.uploader import SegmentUploader, UploadConfig
from vla_dist.serving.server import SingleServer
from vla_dist.testing.fakes import make_segment, make_spec
from vla_dist.testing.serving import build_service

SPEC = make_spec()
FAST = UploadConfig(max_pending=4, retry_s=0.05)


def segment(index: int, **settings: object) -> Segment:
    return make_segment(SPEC, episode_id="e", segment_index=index, **settings)  # type: ignore[arg-type]


@pytest.fixture
def uploader(client: PolicyClient) -> Iterator[SegmentUploader]:
    uploader = SegmentUploader(client, FAST)
    yield uploader
    uploader.close()


def test_segments_arrive_in_order_and_once(site, uploader: SegmentUploader) -> None:  # type: ignore[no-untyped-def]
    for index in (0, 1, 2, 1):
        uploader.submit(segment(index), timeout_s=5)
        uploader.flush(timeout_s=5)
    assert list(site.table.segments) == [("e", 0), ("e", 1), ("e", 2)]
    assert site.table.num_duplicates == 1
    assert uploader.metrics() == {
        "stored": 3,
        "duplicates": 1,
        "quarantined": 0,
        "retries": 0,
        "stream_breaks": 0,
        "pending": 0,
    }


def test_a_busy_replay_is_tried_again(site, uploader: SegmentUploader) -> None:  # type: ignore[no-untyped-def]
    site.table.fail_with += [ReplayWait("the learner is behind"), Unreachable("redis is away")]
    uploader.submit(segment(0), timeout_s=5)
    uploader.flush(timeout_s=5)
    assert uploader.metrics()["retries"] == 2
    site.table.fail_with += [ReplayWait("the learner is behind")]
    for index in (1, 2, 3):
        uploader.submit(segment(index), timeout_s=5)
    uploader.flush(timeout_s=5)
    assert sorted(site.table.segments) == [("e", 0), ("e", 1), ("e", 2), ("e", 3)]
    assert uploader.metrics()["stream_breaks"] == 0


def test_a_bad_segment_does_not_hold_up_the_others(site, uploader: SegmentUploader) -> None:  # type: ignore[no-untyped-def]
    uploader.submit(segment(0), timeout_s=5)
    uploader.submit(segment(1, num_steps=4), timeout_s=5)
    uploader.submit(segment(2), timeout_s=5)
    uploader.flush(timeout_s=5)
    assert sorted(site.table.segments) == [("e", 0), ("e", 2)]
    assert uploader.metrics()["quarantined"] == 1
    assert uploader.metrics()["stream_breaks"] == 0


def test_a_restarted_server_gets_what_the_old_one_did_not_acknowledge(site, uploader: SegmentUploader) -> None:  # type: ignore[no-untyped-def]
    uploader.submit(segment(0), timeout_s=5)
    uploader.flush(timeout_s=5)
    site.kill()
    for index in (1, 2):
        uploader.submit(segment(index), timeout_s=5)
    with pytest.raises(WaitTimeout, match="2 segments are still unacknowledged"):
        uploader.flush(timeout_s=0.2)
    site.start()
    uploader.flush(timeout_s=5)
    assert sorted(site.table.segments) == [("e", 0), ("e", 1), ("e", 2)]
    assert uploader.metrics()["stream_breaks"] >= 1


def test_memory_is_bounded_and_the_caller_keeps_what_did_not_fit(site, uploader: SegmentUploader) -> None:  # type: ignore[no-untyped-def]
    site.kill()
    for index in range(4):
        uploader.submit(segment(index), timeout_s=1)
    with pytest.raises(ReplayWait, match="4 segments wait for"):
        uploader.submit(segment(4), timeout_s=0.1)
    site.start()
    uploader.submit(segment(4), timeout_s=5)
    uploader.flush(timeout_s=5)
    assert len(site.table.segments) == 5


def test_an_acknowledgement_lost_on_the_way_stores_nothing_twice(site, uploader: SegmentUploader) -> None:  # type: ignore[no-untyped-def]
    """The server stored it and died before it could say so: the robot sends it again, the table knows it."""
    original = site.table.append

    def store_and_fail(stored: Segment, *, timeout_s: float):  # type: ignore[no-untyped-def]
        original(stored, timeout_s=timeout_s)
        site.table.append = original
        raise RuntimeError("the machine went away")

    site.table.append = store_and_fail
    uploader.submit(segment(0), timeout_s=5)
    uploader.flush(timeout_s=5)
    assert site.table.num_duplicates == 1
    assert uploader.metrics()["duplicates"] == 1
    assert uploader.metrics()["stream_breaks"] == 1


def test_a_server_without_ingest_says_so(site) -> None:  # type: ignore[no-untyped-def]
    with SingleServer(build_service(site.registry)) as server, PolicyClient(server.address) as client:
        uploader = SegmentUploader(client, FAST)
        uploader.submit(segment(0), timeout_s=1)
        with pytest.raises(WaitTimeout, match="does not offer this call"):
            uploader.flush(timeout_s=0.5)
        uploader.close()


def test_heartbeat_brings_a_command(client: PolicyClient) -> None:
    assert client.heartbeat("r", {"steps": 3.0}) == "continue"


@pytest.mark.parametrize("settings", [{"max_pending": 0}, {"retry_s": 0.0}, {"ack_timeout_s": 0.0}])
def test_settings_are_checked(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        UploadConfig(**settings)  # type: ignore[arg-type]
