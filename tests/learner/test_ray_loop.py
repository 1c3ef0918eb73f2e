"""The loop on real ranks: Ray Train, gloo, kill -9. Starting Ray takes most of the time."""

import contextlib
import json
import os
import re
import shutil
import signal
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
from training_by_ray import fit, make_build, make_sink

from vla_dist.core.errors import Unreachable
from vla_dist.learner.checkpoint import read_checkpoint
from vla_dist.registry.blobs import RedisBlobs
from vla_dist.registry.store import RedisPolicyRegistry
from vla_dist.run.redis_keeper import RedisKeeper

ray = pytest.importorskip("ray")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(300),
    # Ray reads its own deprecated settings, and leaves sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory):
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    del os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"]


class Stalled:
    """A learner that finds its replay away a few times."""

    def __init__(self, stalls):
        self.stalls = stalls

    def step(self):
        if self.stalls:
            self.stalls -= 1
            raise Unreachable("away")
        return {"updates": 1.0}


def test_a_replay_that_is_away_for_long_is_waited_for_and_one_that_stays_away_is_told(monkeypatch, caplog):
    from vla_dist.learner import ray_loop

    monkeypatch.setattr(ray_loop, "_PAUSE_S", 0.0)
    # As many seconds as a server takes to load a large log are no reason to give up.
    assert ray_loop._step(Stalled(30), 600.0) == {"updates": 1.0}
    assert "the learner waits: away" in caplog.text
    with pytest.raises(Unreachable):
        ray_loop._step(Stalled(30), 0.0)


def read_log(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def resumptions(log):
    """Updates at which somebody went on from a checkpoint."""
    starts = [before for _, before, after, *_ in read_log(log) if after > before]
    return [b for a, b in pairwise(starts) if b <= a], starts


def test_a_killed_rank_goes_on_from_the_newest_whole_checkpoint(ray_cluster, tmp_path):
    log = tmp_path / "log"
    build = make_build(str(log), dies_at=25, damages=str(tmp_path / "storage"))
    result = fit(build, tmp_path, num_workers=1)
    assert result.error is None
    assert result.metrics["updates"] == 40
    # That of update 20 is damaged, whether its report has reached the controller or not.
    resumed, starts = resumptions(log)
    assert resumed == [10]
    assert starts[-1] == 35
    with result.checkpoint.as_directory() as directory:
        final = read_checkpoint(Path(directory))
    assert final.updates == 40
    assert final.state["published"] == [0, 15, 40]
    assert final.state["replay"] == {"batches": 40, "windows": 320}
    names = sorted(path.name[:17] for path in (tmp_path / "storage" / "run").glob("update-*"))
    assert names[-2:] == ["update-0000000030", "update-0000000040"]


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_killed_trainer_is_replaced_and_goes_on(ray_cluster, tmp_path):
    log = tmp_path / "log"
    killed = []

    def kill_controller():
        end = time.monotonic() + 120
        while time.monotonic() < end and not killed:
            if log.exists() and len(log.read_text().splitlines()) >= 4:
                killed.extend(p.pid for p in controllers())
                for pid in killed:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)

    killer = threading.Thread(target=kill_controller)
    killer.start()
    # All CPUs there are: what the dead one had reserved must be free again.
    result = fit(make_build(str(log), pause_s=0.5), tmp_path, num_workers=1, num_cpus=2)
    killer.join()
    assert len(killed) == 1
    assert result.metrics["updates"] == 40
    resumed, starts = resumptions(log)
    assert resumed in ([10], [20])
    assert starts[-1] == 35


def controllers():
    return started_by_this_test("ray::TrainController")


def started_by_this_test(name):
    mine = psutil.Process().children(recursive=True)
    return [process for process in mine if command_of(process).startswith(name)]


def command_of(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_storm_of_kills_ends_with_every_version_once(ray_cluster, tmp_path):
    """kill -9 of ranks, of the trainer and of Redis, and flipped bits in the newest checkpoint, at random."""
    rng, log, stop = np.random.default_rng(), tmp_path / "log", threading.Event()
    kills = {"rank": 0, "trainer": 0, "redis": 0, "damage": 0}

    def storm():
        for what in rng.permutation(["rank"] * 3 + ["trainer"] * 2 + ["redis"] * 3 + ["damage"] * 3):
            # Some progress first: who is killed while starting has nothing to go back to.
            enough = count_lines(log) + int(rng.integers(2, 5))
            while count_lines(log) < enough:
                if stop.wait(0.2):
                    return
            stop.wait(rng.uniform(0, 1))
            kills[what] += what != "damage" or damage_newest(tmp_path / "storage")
            if what == "redis":
                os.kill(server.pid, signal.SIGKILL)
                continue
            for process in started_by_this_test("ray::TrainController" if what == "trainer" else "ray::RayTrainWorker"):
                process.kill()

    with contextlib.closing(RedisKeeper(tmp_path / "redis")) as server:
        build = make_build(str(log), pause_s=1.0, redis_url=server.url, total_updates=200)
        thread = threading.Thread(target=storm)
        thread.start()
        try:
            result = fit(build, tmp_path, num_workers=1, max_failures=20)
        finally:
            stop.set()
            thread.join()
        registry = RedisPolicyRegistry(server.url, RedisBlobs(server.url))
        published = [manifest.metrics["updates"] for manifest in registry.manifests("p")]
        last = registry.fetch("p", registry.resolve("p@stable"))
        registry.close()
    resumed, starts = resumptions(log)
    print(f"{kills}, went back to {resumed}, {len(starts)} steps of 40")
    assert result.metrics["updates"] == 200
    assert published == [0, 15, 200]
    assert last.manifest.metrics["updates"] == 200
    assert sum(kills.values()) >= 5
    assert server.deaths == kills["redis"]
    assert len(resumed) >= 2


def count_lines(path):
    return len(path.read_text().splitlines()) if path.exists() else 0


def damage_newest(storage):
    """Whether it did; only where an older one can be gone back to and none is damaged yet: of two one is whole."""
    found = sorted(storage.glob("run/update-*/tensors.safetensors"))
    if len(found) < 2 or list(storage.glob("run/update-*/damaged")):
        return False
    try:
        (found[-1].parent / "damaged").touch()
        data = bytearray(found[-1].read_bytes())
        data[-3] ^= 1
        found[-1].write_bytes(data)
    except FileNotFoundError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", ["ddp", "fsdp2"])
def test_two_ranks_keep_one_model(ray_cluster, tmp_path, parallelism):
    log = tmp_path / "log"
    told = tmp_path / "told"
    post = make_sink(str(told))
    result = fit(make_build(str(log), dies_at=15), tmp_path, num_workers=2, parallelism=parallelism, post=post)
    assert result.metrics["updates"] == 40
    words = told.read_text().split()
    assert words[-1] == "closed"
    assert words.count("40") == 1, "one rank writes the logs"
    rows = read_log(log)
    by_update = {}
    for rank, before, after, weight, mean in rows:
        if after > before:
            by_update.setdefault(after, {})[rank] = (weight, mean)
    assert sorted(by_update) == [5, 10, 15, 20, 25, 30, 35, 40]
    for ranks in by_update.values():
        assert ranks[0][0] == pytest.approx(ranks[1][0], abs=1e-9)
        assert ranks[0][1] == ranks[1][1]


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_deleted_checkpoints_and_half_a_note_of_them_do_not_stop_a_resumption(ray_cluster, tmp_path):
    log, storage = tmp_path / "log", tmp_path / "storage" / "run"
    assert fit(make_build(str(log)), tmp_path, num_workers=1).metrics["updates"] == 40
    newest = max(storage.glob("update-*"))
    shutil.rmtree(newest)
    assert fit(make_build(str(log), total_updates=50), tmp_path, num_workers=1).metrics["updates"] == 50
    assert resumptions(log)[0] == [30]
    note = storage / "checkpoint_manager_snapshot.json"
    note.write_text(note.read_text()[:100])
    assert fit(make_build(str(log), total_updates=60), tmp_path, num_workers=1).metrics["updates"] == 60
    # The second run ended at 50, and the third went on from there.
    assert resumptions(log)[0] == [30]
    for path in storage.glob("update-*"):
        shutil.rmtree(path)
    assert fit(make_build(str(log), total_updates=20), tmp_path, num_workers=1).metrics["updates"] == 20
    assert resumptions(log)[0] == [30, 0]


@pytest.mark.chaos
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("trouble", "trace", "went_back"),
    [
        ({"storage_fails_at": 20}, "log.full", [10]),
        ({"dies_writing_at": 20}, "log.died", [10]),
        ({"dies_after_writing": 20}, "log.died", []),
    ],
    ids=["full_disk", "killed_while_writing", "killed_before_the_report"],
)
def test_a_checkpoint_that_fails_costs_the_updates_since_the_last_whole_one(
    ray_cluster, tmp_path, trouble, trace, went_back
):
    log = tmp_path / "log"
    result = fit(make_build(str(log), **trouble), tmp_path, num_workers=1)
    assert result.metrics["updates"] == 40
    assert (tmp_path / trace).exists()
    resumed, starts = resumptions(log)
    assert resumed == went_back
    assert starts[-1] == 35
    # Ray Train keeps two; what it was never told of, and what was half written, is gone.
    names = sorted(path.name[:17] for path in (tmp_path / "storage" / "run").iterdir() if path.is_dir())
    assert names == ["update-0000000030", "update-0000000040"]


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_redis_killed_in_the_middle_of_an_epoch_costs_no_update(ray_cluster, tmp_path):
    log = tmp_path / "log"

    def kill_redis():
        end = time.monotonic() + 200
        while time.monotonic() < end and count_lines(log) < 3:
            time.sleep(0.05)
        os.kill(server.pid, signal.SIGKILL)

    with contextlib.closing(RedisKeeper(tmp_path / "redis")) as server:
        killer = threading.Thread(target=kill_redis)
        killer.start()
        result = fit(make_build(str(log), pause_s=0.2, redis_url=server.url), tmp_path, num_workers=1, max_failures=0)
        killer.join()
        assert server.deaths == 1
        registry = RedisPolicyRegistry(server.url, RedisBlobs(server.url))
        assert [manifest.metrics["updates"] for manifest in registry.manifests("p")] == [0, 15, 40]
        registry.close()
    assert result.metrics["updates"] == 40
    assert resumptions(log)[0] == []


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_loss_that_stays_broken_ends_the_training_names_its_windows_and_keeps_the_last_version(ray_cluster, tmp_path):
    from ray.train import TrainingFailedError

    log = tmp_path / "log"
    with contextlib.closing(RedisKeeper(tmp_path / "redis")) as server:
        with pytest.raises(TrainingFailedError) as failure:
            fit(make_build(str(log), redis_url=server.url, spoilt_from=25), tmp_path, num_workers=1)
        registry = RedisPolicyRegistry(server.url, RedisBlobs(server.url))
        assert [manifest.metrics["updates"] for manifest in registry.manifests("p")] == [0, 15]
        last = registry.fetch("p", registry.resolve("p@stable"))
        registry.close()
    (reason,) = {str(error) for error in failure.value.worker_failures.values()}
    assert re.search(r"update \d+ is not finite.*window 4 replay item \d+ task '(go|stop)'", reason)
    assert all(np.isfinite(tensor).all() for tensor in last.tensors.values())
    assert resumptions(log)[0] == [20]
