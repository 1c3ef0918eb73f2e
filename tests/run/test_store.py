import contextlib
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from vla_dist.core.errors import ConfigError, Unreachable
from vla_dist.core.specs import CameraSpec
from vla_dist.replay.archive.archiver import read_archive
from vla_dist.replay.external import split_urls
from vla_dist.replay.server import EmbeddedServer
from vla_dist.replay.shards import ShardedReplayTable
from vla_dist.run.composition.place import Place
from vla_dist.run.composition.stores import build_archivers, build_registry, build_table
from vla_dist.run.files import CONFIG, write_atomically
from vla_dist.run.head_store import STORE_FOLDER
from vla_dist.run.presets import preset
from vla_dist.run.reach import reach_store
from vla_dist.run.store import STORE_VARIABLE, existing_store_url, open_store
from vla_dist.testing.fakes import make_segment, make_spec

CAMERAS = (CameraSpec(name="front", height=8, width=8),)


@pytest.fixture
def make_config():
    def make(*, cameras=CAMERAS, **replay):
        config = preset("demo")
        return replace(
            config, env=replace(config.env, cameras=cameras), replay=replace(config.replay, **replay, min_steps=1)
        )

    return make


def open_place(config, run_dir, store):
    spec = make_spec(cameras=config.env.cameras)
    return Place(
        config=config,
        run_id="run",
        run_dir=Path(run_dir),
        redis_url=store.redis_url,
        images_url=store.images_url,
        spec=spec,
        shard_urls=store.shard_urls,
        shard_images_urls=store.shard_images_urls,
    )


def value_of(url, section, name):
    with redis.Redis.from_url(url) as client:
        return client.info(section)[name]


def test_a_run_with_cameras_has_a_second_server_that_logs_nothing(make_config, tmp_path):
    config = make_config()
    with open_store(config, tmp_path) as store:
        assert store.images_url is not None
        assert value_of(store.redis_url, "persistence", "aof_enabled") == 1
        assert value_of(store.images_url, "persistence", "aof_enabled") == 0
        place = open_place(config, tmp_path, store)
        table = build_table(place)
        table.append(make_segment(place.spec, episode_id="e", num_steps=32, is_last=True), timeout_s=5.0)
        with redis.Redis.from_url(store.images_url) as client:
            assert len(list(client.scan_iter("*:image:*"))) == 1
        with redis.Redis.from_url(store.redis_url) as client:
            assert list(client.scan_iter("*:image:*")) == []
        table.close()
        build_registry(place).manifests("none")
    # A stopped run has saved its images.
    with open_store(config, tmp_path) as store:
        table = build_table(open_place(config, tmp_path, store))
        assert table.sample(3, timeout_s=5.0).num_windows == 3
        table.close()


def test_a_run_without_cameras_has_one_server(make_config, tmp_path):
    with open_store(make_config(cameras=()), tmp_path) as store:
        assert store.images_url is None
        assert {path.name for path in tmp_path.iterdir()} == {"redis"}


def test_a_killed_image_server_costs_a_resumed_run_its_images_alone(make_config, tmp_path):
    config = make_config()
    with open_store(config, tmp_path) as store:
        place = open_place(config, tmp_path, store)
        table = build_table(place)
        table.append(make_segment(place.spec, episode_id="e", num_steps=32, is_last=True), timeout_s=5.0)
        os.kill(value_of(store.images_url, "server", "process_id"), signal.SIGKILL)
        table.close()
    with open_store(config, tmp_path) as store:
        table = build_table(open_place(config, tmp_path, store))
        assert list(table.episodes()) == []
        assert table.state().discarded == 1
        table.close()


def test_given_servers_are_used_and_asked_first(make_config, tmp_path):
    with EmbeddedServer(tmp_path / "mine") as mine, EmbeddedServer(tmp_path / "images", append_only=False) as images:
        with open_store(make_config(redis_url=mine.url), tmp_path) as store:
            assert (store.redis_url, store.images_url) == (mine.url, None)
        config = make_config(redis_url=mine.url, images_redis_url=images.url)
        with open_store(config, tmp_path) as store:
            assert (store.redis_url, store.images_url) == (mine.url, images.url)
        images.close()
        with pytest.raises(Unreachable, match="images"), open_store(config, tmp_path):
            pass
    assert not (tmp_path / "redis").exists()


def test_several_servers_share_the_replay(make_config, tmp_path):
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(EmbeddedServer(tmp_path / f"mine-{n}")) for n in range(4)]
        urls = [server.url for server in servers]
        config = make_config(
            redis_url=",".join(urls[:3]), images_redis_url=urls[3], capacity_steps=300_000, archive="archive"
        )
        with open_store(config, tmp_path) as store:
            assert store.redis_url == urls[0]
            place = open_place(config, tmp_path, store)
            table = build_table(place)
            assert isinstance(table, ShardedReplayTable)
            for number in range(8):
                segment = make_segment(place.spec, episode_id=f"e{number}", num_steps=32, is_last=True)
                table.append(segment, timeout_s=5.0)
            assert table.sample(8, timeout_s=5.0).num_windows == 8
            table.close()
            for archiver in build_archivers(place):
                archiver.flush(timeout_s=20.0)
                archiver.close()
            archived = list(read_archive(tmp_path / "archive"))
            assert sorted(segments[0].episode_id for segments in archived) == [f"e{n}" for n in range(8)]
            with redis.Redis.from_url(urls[3]) as client:
                assert len(list(client.scan_iter("*:image:*"))) == 8
            assert build_registry(place).manifests("none") == []
        alone = make_config(redis_url=urls[0])
        with open_store(alone, tmp_path) as store, pytest.raises(ConfigError, match="created over several servers"):
            build_table(open_place(alone, tmp_path, store))


def test_servers_that_do_not_fit_each_other_are_refused(make_config):
    with pytest.raises(ConfigError, match=r"images_redis_url names 2 servers, expected one, or 3"):
        make_config(redis_url="redis://a,redis://b,redis://c", images_redis_url="redis://d,redis://e")


def test_a_comma_in_a_password_separates_nothing():
    urls = ("redis://u:a,b@host:1/0", "rediss://host:2", "unix:///run/a,b.sock")
    assert split_urls(",".join(urls)) == urls
    assert split_urls(", ".join(urls)) == urls
    assert split_urls("") == ()


def test_a_killed_redis_of_a_run_comes_back_under_its_address_with_its_data(make_config, tmp_path):
    config = make_config(cameras=())
    with open_store(config, tmp_path) as store:
        assert store.notes() == ()
        place = open_place(config, tmp_path, store)
        table = build_table(place)
        table.append(make_segment(place.spec, episode_id="e", num_steps=32, is_last=True), timeout_s=5.0)
        os.kill(store.keepers[0].pid, signal.SIGKILL)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with contextlib.suppress(Unreachable):
                assert table.sample(3, timeout_s=5.0).num_windows == 3
                if store.notes():
                    break
            time.sleep(0.05)
        assert store.notes() == ("redis died and was started again (1 so far)",)
        table.close()


def test_a_run_on_a_cluster_is_found_by_who_logs_in_on_its_head(make_config, tmp_path, monkeypatch):
    """It used to be looked for in its folder, where an empty replay was then begun."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv(STORE_VARIABLE, raising=False)
    run_dir, folder = tmp_path / "run", tmp_path / "home" / STORE_FOLDER
    run_dir.mkdir()
    write_atomically(run_dir / CONFIG, make_config(cameras=()).to_json())
    with EmbeddedServer(tmp_path / "redis", port=0) as server:
        url = server.tcp_url
        folder.mkdir(parents=True)
        addresses = {"pid": os.getpid(), "replay_url": url, "ray_url": url}
        (folder / "addresses.json").write_text(json.dumps(addresses))
        with reach_store(run_dir) as store:
            assert store.redis_url == url
        assert not (run_dir / "redis").exists()
        # A run that begins there has a server of its own, unless it is a job of the cluster.
        with open_store(make_config(cameras=()), tmp_path / "new") as store:
            assert store.is_local
        assert existing_store_url(run_dir) == url
        assert existing_store_url(tmp_path / "new") == ""
