"""Images on a server of their own: no crash of a writer or of that server leaves more than what can be put right."""

import os
import re
import signal
import time

import numpy as np
import pytest
import redis

from vla_dist.core.errors import ReplayWait, Unreachable
from vla_dist.core.specs import CameraSpec
from vla_dist.data.image_codec import ImageEncoding
from vla_dist.replay import arrivals
from vla_dist.replay.config import BufferConfig, Fifo, TableConfig
from vla_dist.replay.keys import episode_digest
from vla_dist.replay.limiter import LimiterConfig
from vla_dist.replay.queue import EpisodeQueue
from vla_dist.replay.server import EmbeddedServer
from vla_dist.replay.sweeping import sweep_images
from vla_dist.replay.table import RedisReplayTable
from vla_dist.testing.fakes import make_spec

SPEC = make_spec(
    cameras=(CameraSpec(name="front", height=6, width=5), CameraSpec(name="wrist", height=3, width=4)),
    max_episode_steps=20,
)


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """A server of images that no test kills."""
    with EmbeddedServer(tmp_path_factory.mktemp("images"), append_only=False) as running:
        yield running


@pytest.fixture
def make_apart(make_table, server, apart):
    def make(*, images=None, **settings):
        return make_table(spec=SPEC, images_url=(images or apart).url, **settings)

    return make


@pytest.fixture
def image_keys():
    """Names of the images of a table's buffer, each with its expiry in ms; -1: none."""

    def scan(table, running):
        with redis.Redis.from_url(running.url) as client:
            names = sorted(client.scan_iter(table.keys.prefix + "*", count=10_000))
            return {name.decode().removeprefix(table.keys.prefix): client.pttl(name) for name in names}

    return scan


def restart_empty(running):
    """Kill a server that logs nothing and start it again on its directory."""
    os.kill(running.pid, signal.SIGKILL)
    while running.alive:
        time.sleep(0.01)
    return EmbeddedServer(running.directory, append_only=False)


@pytest.fixture
def make_mortal(tmp_path):
    """Servers of images that may be killed and started again."""
    running = []

    def make(former=None):
        running.append(EmbeddedServer(tmp_path / "mortal", append_only=False) if former is None else former)
        return running[-1]

    yield make
    for one in running:
        one.close()


def make_images(make_episode, episode_id, length, **options):
    return make_episode(episode_id, length, spec=SPEC, **options)


@pytest.mark.parametrize("encoding", [None, "lz4"])
def test_segments_come_back_as_they_were(make_apart, make_episode, append_all, keys_of, image_keys, apart, encoding):
    encodings = {} if encoding is None else {"front": ImageEncoding.parse(encoding)}
    table = make_apart(image_encodings=encodings)
    stored = [make_images(make_episode, f"e{n}", length, seed=n) for n, length in enumerate((10, 3))]
    for segments in stored:
        append_all(table, segments)
    for found, expected in zip(table.episodes(), stored, strict=True):
        for mine, theirs in zip(found, expected, strict=True):
            for camera in ("front", "wrist"):
                np.testing.assert_array_equal(mine.images[camera][: mine.length], theirs.images[camera][: mine.length])
    assert not [name for name in keys_of(table) if "image:" in name]
    expiries = image_keys(table, apart)
    assert len(expiries) == 2 * (3 + 1)
    assert set(expiries.values()) == {-1}
    batch = table.sample(16, timeout_s=5.0)
    frames = np.concatenate([segment.images["front"][: segment.length] for segment in stored[0]])
    for window in np.flatnonzero(batch.episode_lengths == 10).tolist():
        mask = batch.padding_mask[window]
        np.testing.assert_array_equal(batch.images["front"][window][mask], frames[batch.timesteps[window][mask]])


def test_eviction_takes_the_images_along_whoever_caused_it(make_apart, make_client, make_episode, image_keys, apart):
    table = make_apart(capacity_steps=50)
    other = make_client(table, images_url=apart.url)
    for number in range(20):
        writer = (table, other)[number % 2]
        writer.append_all(make_images(make_episode, f"e{number}", 10), timeout_s=5.0)
    stored = {entry["digest"] for entry in table.reader.entries(timeout_s=5.0)}
    assert len(stored) == 5
    names = image_keys(table, apart)
    assert {name.split(":")[1] for name in names} == stored
    assert len(names) == 5 * 3 * 2
    assert sweep_images(table).removed == 0


def test_one_append_of_many_batches_removes_the_images_of_each_episode_once(
    make_apart, make_episode, image_keys, apart, monkeypatch
):
    monkeypatch.setattr(arrivals, "_MOST_SEGMENTS", 4)
    table = make_apart(capacity_steps=50)
    episodes = [make_images(make_episode, f"e{number}", 10) for number in range(20)]

    def num_unlinks():
        (info,) = table.images_link.call([("INFO", "commandstats")], timeout_s=5.0)
        found = re.search(rb"cmdstat_unlink:calls=(\d+)", info)
        return int(found[1]) if found else 0

    before = num_unlinks()
    table.append_all([segment for segments in episodes for segment in segments], timeout_s=10.0)
    assert num_unlinks() - before == 15
    assert len(image_keys(table, apart)) == 5 * 3 * 2
    # Only the next commit takes what the last ones removed off the list.
    table.append_all(make_images(make_episode, "last", 10), timeout_s=5.0)
    assert num_unlinks() - before == 16
    assert len(image_keys(table, apart)) == 5 * 3 * 2


def test_an_episode_that_leaves_twice_during_one_append_takes_its_images_along(
    make_apart, make_episode, image_keys, apart, monkeypatch
):
    monkeypatch.setattr(arrivals, "_MOST_SEGMENTS", 4)
    table = make_apart(capacity_steps=50, remembered_episodes=1)
    names = ("again", *"abcdefgh", "again", *"ijklmn")
    table.append_all(
        [segment for name in names for segment in make_images(make_episode, name, 10)],
        timeout_s=10.0,
    )
    stored = {entry["digest"] for entry in table.reader.entries(timeout_s=5.0)}
    assert stored == {episode_digest(name) for name in "jklmn"}
    assert {name.split(":")[1] for name in image_keys(table, apart)} == stored


def test_images_leave_with_episodes_that_were_used_up_or_discarded(make_apart, make_episode, image_keys, apart):
    table = make_apart(max_draws=1)
    table.append_all(make_images(make_episode, "e", 3), timeout_s=5.0)
    table.sample(1, timeout_s=5.0)
    assert image_keys(table, apart) == {}
    table.append_all(make_images(make_episode, "f", 3), timeout_s=5.0)
    assert table.discard(2)
    assert image_keys(table, apart) == {}
    assert table.state().discarded == table.stats().episodes_discarded == 1


def test_images_leave_with_acknowledged_episodes(make_apart, make_episode, image_keys, apart):
    table = make_apart(sampler=Fifo())
    table.append_all(make_images(make_episode, "e", 9), timeout_s=5.0)
    queue = EpisodeQueue(table, "me")
    taken = queue.take(1, timeout_s=5.0)
    assert len(image_keys(table, apart)) == 6
    assert queue.acknowledge(taken) == 1
    assert image_keys(table, apart) == {}


class Died(Exception):
    pass


@pytest.mark.parametrize("point", ["after the images", "after the commit"])
def test_a_writer_that_died_half_way_is_made_good_by_its_retry(
    make_apart, make_client, make_episode, image_keys, apart, monkeypatch, point
):
    table = make_apart()
    (segment,) = make_images(make_episode, "e", 3)
    # What comes first after each point.
    step = {"after the images": "_transaction", "after the commit": "_judge"}[point]

    def dying(*_, **__):
        raise Died

    monkeypatch.setattr(table._writer, step, dying)
    with pytest.raises(Died):
        table.append(segment, timeout_s=5.0)
    expiries = image_keys(table, apart)
    assert len(expiries) == 2
    assert all(expiry > 0 for expiry in expiries.values())
    other = make_client(table, images_url=apart.url)
    assert other.append(segment, timeout_s=5.0) == ("inserted" if point == "after the images" else "duplicate")
    assert set(image_keys(table, apart).values()) == {-1}
    assert other.sample(2, timeout_s=5.0).num_windows == 2


def test_a_sweep_keeps_the_images_of_a_writer_that_died_after_the_commit(make_apart, make_episode, image_keys, apart):
    table = make_apart()
    table.append_all(make_images(make_episode, "e", 10), timeout_s=5.0)
    table.append_all(make_images(make_episode, "open", 10)[:1], timeout_s=5.0)
    digest = next(iter(table.reader.entries(timeout_s=5.0)))["digest"]
    open_digest = next(name for name in image_keys(table, apart) if digest not in name).split(":")[1]
    with redis.Redis.from_url(apart.url) as client:
        for name in (f"image:{digest}:1:0", f"image:{open_digest}:0:1"):
            client.pexpire(table.keys.prefix + name, 50_000)
        # Of a segment that somebody is just about to commit.
        client.set(table.keys.prefix + f"image:{open_digest}:1:0", b"uploaded", px=50_000)
        client.set(table.keys.prefix + "image:AAAAAAAAAAAAAAAA:0:0", b"uploaded", px=50_000)
    swept = sweep_images(table)
    assert (swept.removed, swept.kept, swept.discarded) == (0, 2, 0)
    expiring = {name for name, expiry in image_keys(table, apart).items() if expiry >= 0}
    assert expiring == {f"image:{open_digest}:1:0", "image:AAAAAAAAAAAAAAAA:0:0"}


def test_orphans_are_swept(make_apart, make_episode, image_keys, apart):
    table = make_apart()
    table.append_all(make_images(make_episode, "e", 10), timeout_s=5.0)
    before = image_keys(table, apart)
    digest = next(iter(before)).split(":")[1]
    with redis.Redis.from_url(apart.url) as client:
        for name in ("image:AAAAAAAAAAAAAAAA:0:0", "image:AAAAAAAAAAAAAAAA:0:1", f"image:{digest}:3:0"):
            client.set(table.keys.prefix + name, b"orphan")
        client.set("{buffer:" + table.config.name + "-other}:image:AAAAAAAAAAAAAAAA:0:0", b"not ours")
    assert sweep_images(table).removed == 3
    assert image_keys(table, apart) == before
    with redis.Redis.from_url(apart.url) as client:
        assert client.exists("{buffer:" + table.config.name + "-other}:image:AAAAAAAAAAAAAAAA:0:0")


def test_images_whose_writer_died_at_eviction_are_removed_by_the_next(
    make_apart, make_client, make_episode, image_keys, apart, monkeypatch
):
    table = make_apart(capacity_steps=50)
    for number in range(5):
        table.append_all(make_images(make_episode, f"e{number}", 10), timeout_s=5.0)

    def dying(*_, **__):
        raise Died

    other = make_client(table, images_url=apart.url)
    monkeypatch.setattr(other._writer._images, "settlement", dying)
    with pytest.raises(Died):
        other.append_all(make_images(make_episode, "f", 3), timeout_s=5.0)
    assert len(image_keys(table, apart)) == 5 * 6 + 2
    table.append_all(make_images(make_episode, "g", 3), timeout_s=5.0)
    assert len(image_keys(table, apart)) == 4 * 6 + 2 + 2


def test_images_that_vanish_during_an_append_come_again(make_apart, make_episode, image_keys, apart, monkeypatch):
    table = make_apart()
    original, calls = table._writer._commands, []

    def forgetful(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            with redis.Redis.from_url(apart.url) as client:
                client.unlink(*client.scan_iter(table.keys.prefix + "image:*"))
        return original(*arguments)

    monkeypatch.setattr(table._writer, "_commands", forgetful)
    assert table.append_all(make_images(make_episode, "e", 10), timeout_s=5.0) == ["inserted"] * 3
    assert set(image_keys(table, apart).values()) == {-1}
    assert len(image_keys(table, apart)) == 6
    assert len(list(table.episodes())) == 1


def test_what_contradicts_its_episode_leaves_nothing_behind(make_apart, make_table, make_episode, image_keys, apart):
    for table in (make_apart(), make_table(spec=SPEC)):
        right = make_images(make_episode, "e", 16)
        wrong = make_images(make_episode, "e", 8, seed=9)[1]
        table.append(right[2], timeout_s=5.0)
        with pytest.raises(ValueError, match="contradicts"):
            table.append(wrong, timeout_s=5.0)
        table.append_all(right, timeout_s=5.0)
        ((_, found, *_),) = table.episodes()
        np.testing.assert_array_equal(found.images["front"], right[1].images["front"])
        np.testing.assert_array_equal(found.proprio, right[1].proprio)


def test_a_lost_image_server_costs_its_episodes_and_nothing_else(
    make_mortal, make_apart, make_client, make_episode, caplog
):
    images = make_mortal()
    # A reader that keeps frames would not miss those that it has.
    table = make_apart(images=images, cache_bytes=0)
    for number in range(40):
        table.append_all(make_images(make_episode, f"e{number}", 10), timeout_s=5.0)
    table.sample(8, timeout_s=5.0)
    images = make_mortal(restart_empty(images))
    # Some episodes come after the loss; one begins before and ends after would be lost too.
    for number in range(3):
        table.append_all(make_images(make_episode, f"new{number}", 10), timeout_s=5.0)
    with caplog.at_level("WARNING"):
        batch = table.sample(32, timeout_s=20.0)
    assert batch.num_windows == 32
    state = table.state()
    assert (state.discarded, state.complete, state.steps) == (40, 3, 30)
    assert state.tables[0].limiter.drawable_steps == 30
    assert "40 episodes were discarded: part of their payload was missing on Redis at" in caplog.text
    assert table.stats().episodes_discarded == 40
    assert [segments[0].episode_id for segments in table.episodes()] == ["new0", "new1", "new2"]


def test_one_lost_image_costs_one_episode(make_apart, make_episode, apart):
    table = make_apart(cache_bytes=0)
    for number in range(10):
        table.append_all(make_images(make_episode, f"e{number}", 10), timeout_s=5.0)
    digest = next(iter(table.reader.entries(timeout_s=5.0)))["digest"]
    with redis.Redis.from_url(apart.url) as client:
        client.unlink(table.keys.image(digest, 2, 1))
    end = time.monotonic() + 20.0
    while not table.state().discarded:
        assert time.monotonic() < end, "the damaged episode is never found"
        assert table.sample(64, timeout_s=10.0).num_windows == 64
    assert (table.state().discarded, table.state().complete) == (1, 9)


def test_where_nothing_is_left_the_wait_says_why(make_mortal, make_apart, make_episode):
    images = make_mortal()
    table = make_apart(images=images, limiter=LimiterConfig(min_steps=5), cache_bytes=0)
    table.append_all(make_images(make_episode, "e", 10), timeout_s=5.0)
    make_mortal(restart_empty(images))
    start = time.monotonic()
    with pytest.raises(ReplayWait, match=r"1 stored episodes lack a part of their payload.*mortal/server\.sock"):
        table.sample(4, timeout_s=0.3)
    with pytest.raises(ReplayWait, match="all episodes were evicted or discarded in between"):
        table.sample(4, timeout_s=3.0)
    assert time.monotonic() - start < 10.0
    table.append_all(make_images(make_episode, "f", 10), timeout_s=5.0)
    assert table.sample(4, timeout_s=5.0).num_windows == 4


def test_lost_payloads_do_not_stop_readers_of_whole_episodes(make_apart, make_episode, apart):
    table = make_apart(tables=(TableConfig(name="queue", sampler=Fifo()),))
    for number in range(3):
        table.append_all(make_images(make_episode, f"e{number}", 3), timeout_s=5.0)
    digest = next(iter(table.reader.entries(timeout_s=5.0)))["digest"]
    with redis.Redis.from_url(apart.url) as client:
        client.unlink(table.keys.image(digest, 0, 0))
    queue = EpisodeQueue(table, "me")
    taken = [episode for _ in range(2) for episode in queue.take(1, timeout_s=10.0)]
    assert [episode.segments[0].episode_id for episode in taken] == ["e1", "e2"]
    assert (queue.lost_episodes, table.state().discarded) == (1, 1)


def test_a_stopped_image_server_is_unreachable_and_costs_nothing(make_mortal, make_apart, make_episode):
    images = make_mortal()
    table = make_apart(images=images)
    table.append_all(make_images(make_episode, "e", 10), timeout_s=5.0)
    images.close()
    start = time.monotonic()
    for call in (
        lambda: table.sample(2, timeout_s=0.4),
        lambda: table.append_all(make_images(make_episode, "f", 3), timeout_s=0.4),
    ):
        with pytest.raises(Unreachable, match="mortal"):
            call()
    assert time.monotonic() - start < 8.0
    assert (table.state().discarded, table.state().complete) == (0, 1)
    # What was saved when it stopped is there again.
    make_mortal(EmbeddedServer(images.directory, append_only=False))
    assert table.sample(2, timeout_s=10.0).num_windows == 2


def test_a_buffer_says_where_its_images_are(make_apart, server, apart):
    table = make_apart()
    with pytest.raises(ValueError, match="images_apart False against True"):
        RedisReplayTable(
            server.url,
            SPEC,
            BufferConfig(**{name: getattr(table.config, name) for name in BufferConfig.__dataclass_fields__}),
        )
