"""Every segment arrives once, whatever happens on the way, and the robot never waits for the network."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vla_dist.core.errors import ConfigError, ReplayWait, Unreachable, WaitTimeout
from vla_dist.core.types import Segment
from vla_dist.robot.bandwidth import Bandwidth
from vla_dist.robot.client import PolicyClient
from vla_dist.robot.fleet_client import FleetClient
from vla_dist.robot.spool import Spool, SpoolConfig
from vla_dist.robot.spool_writer import spool_sink
from vla_dist.robot.uploader import SpoolUploader, UploadConfig
from vla_dist.serving.server import SingleServer
from vla_dist.testing.fakes import make_segment, make_spec
from vla_dist.testing.serving import build_service

SPEC = make_spec()
FAST = UploadConfig(retry_s=0.02, max_retry_s=0.1)


def put(spool: Spool, episode_id: str = "e", *, num_segments: int = 3, bad: int = -1) -> None:
    take = spool_sink(spool)
    for index in range(num_segments):
        num_steps = 4 if index == bad else 8
        is_last = index == num_segments - 1
        take(make_segment(SPEC, episode_id=episode_id, segment_index=index, is_last=is_last, num_steps=num_steps))


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool(tmp_path / "spool", SpoolConfig(max_bytes=10 << 20, reserve_bytes=0))
    yield spool
    spool.close()


@pytest.fixture
def uploader(client: PolicyClient, spool: Spool) -> Iterator[SpoolUploader]:
    uploader = SpoolUploader(FleetClient(client, robot_id="robot-0", spool_id=spool.spool_id), spool, FAST)
    yield uploader
    uploader.close()


def test_segments_arrive_in_order_and_once(site, uploader: SpoolUploader, spool: Spool) -> None:  # type: ignore[no-untyped-def]
    put(spool)
    uploader.flush(timeout_s=5)
    assert list(site.table.segments) == [("e", 0), ("e", 1), ("e", 2)]
    assert [site.table.segments["e", index].is_last for index in range(3)] == [False, False, True]
    metrics = uploader.metrics()
    assert (metrics["stored"], metrics["duplicates"], metrics["stream_breaks"]) == (3, 0, 0)


def test_an_episode_is_under_way_while_it_is_recorded(site, uploader: SpoolUploader, spool: Spool) -> None:  # type: ignore[no-untyped-def]
    for index in range(3):
        spool.put(make_segment(SPEC, episode_id="e", segment_index=index))
    end = time.monotonic() + 5
    while len(site.table.segments) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    assert list(site.table.segments) == [("e", 0), ("e", 1)]


def test_a_busy_replay_is_tried_again(site, uploader: SpoolUploader, spool: Spool) -> None:  # type: ignore[no-untyped-def]
    site.table.fail_with += [ReplayWait("the learner is behind"), Unreachable("redis is away")]
    put(spool)
    uploader.flush(timeout_s=5)
    assert uploader.metrics()["retries"] >= 1
    assert not site.table.fail_with
    assert sorted(site.table.segments) == [("e", 0), ("e", 1), ("e", 2)]


def test_a_bad_segment_does_not_hold_up_the_others(site, uploader: SpoolUploader, spool: Spool) -> None:  # type: ignore[no-untyped-def]
    put(spool, bad=1)
    uploader.flush(timeout_s=5)
    assert sorted(site.table.segments) == [("e", 0), ("e", 2)]
    assert uploader.metrics()["quarantined"] == 1
    assert uploader.metrics()["stream_breaks"] == 0
    assert "shape (4, 5)" in (spool.folder / "refused" / "e-1.reason").read_text()


def test_a_restarted_server_gets_what_the_old_one_did_not_acknowledge(site, uploader, spool: Spool) -> None:  # type: ignore[no-untyped-def]
    put(spool, "before")
    uploader.flush(timeout_s=5)
    site.kill()
    put(spool, "during")
    with pytest.raises(WaitTimeout, match="1 episodes are still unacknowledged"):
        uploader.flush(timeout_s=0.2)
    site.start()
    uploader.flush(timeout_s=10)
    assert sorted(name for name, _ in site.table.segments) == ["before"] * 3 + ["during"] * 3
    assert uploader.metrics()["stream_breaks"] >= 1


def test_the_next_process_goes_on_with_the_spool(site, client: PolicyClient, spool: Spool) -> None:  # type: ignore[no-untyped-def]
    put(spool)
    spool.close()
    again = Spool(spool.folder)
    uploader = SpoolUploader(FleetClient(client, robot_id="robot-0", spool_id=again.spool_id), again, FAST)
    uploader.flush(timeout_s=5)
    uploader.close()
    again.close()
    assert len(site.table.segments) == 3


def test_an_acknowledgement_lost_on_the_way_stores_nothing_twice(site, uploader, spool: Spool) -> None:  # type: ignore[no-untyped-def]
    """The server stored it and died before it could say so: the robot sends it again, the table knows it."""
    original = site.table.append

    def store_and_fail(stored: Segment, *, timeout_s: float):  # type: ignore[no-untyped-def]
        original(stored, timeout_s=timeout_s)
        site.table.append = original
        raise RuntimeError("the machine went away")

    site.table.append = store_and_fail
    put(spool, num_segments=1)
    uploader.flush(timeout_s=5)
    assert site.table.num_duplicates == 1
    assert uploader.metrics()["duplicates"] == 1
    assert uploader.metrics()["stream_breaks"] == 1


def test_a_server_that_forgot_its_last_second_gets_it_again(site, uploader: SpoolUploader, spool: Spool) -> None:  # type: ignore[no-untyped-def]
    put(spool, "forgotten")
    uploader.flush(timeout_s=5)
    site.kill()
    site.table.segments.clear()
    put(spool, "later")
    time.sleep(0.3)
    site.start()
    end = time.monotonic() + 10
    while len(site.table.segments) < 6 and time.monotonic() < end:
        time.sleep(0.02)
    assert sorted({name for name, _ in site.table.segments}) == ["forgotten", "later"]


def test_a_server_without_ingest_says_so(site, spool: Spool) -> None:  # type: ignore[no-untyped-def]
    with SingleServer(build_service(site.registry)) as server, PolicyClient(server.address) as client:
        fleet = FleetClient(client, robot_id="robot-0", spool_id=spool.spool_id)
        uploader = SpoolUploader(fleet, spool, FAST)
        put(spool)
        with pytest.raises(WaitTimeout, match="does not offer this call"):
            uploader.flush(timeout_s=0.5)
        uploader.close()


def test_bandwidth_is_kept_on_average() -> None:
    import threading

    bandwidth, stop = Bandwidth(50_000.0), threading.Event()
    started = time.monotonic()
    for _ in range(15):
        assert bandwidth.take(5_000, stop=stop)
    # 75 kB at 50 kB/s, of which the first second's worth goes at once.
    assert 0.4 <= time.monotonic() - started < 3.0
    stop.set()
    assert not bandwidth.take(500_000, stop=stop)


@pytest.mark.parametrize("settings", [{"window": 0}, {"retry_s": 0.0}, {"ack_timeout_s": 0.0}, {"bytes_per_s": 0.0}])
def test_settings_are_checked(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        UploadConfig(**settings)  # type: ignore[arg-type]
