"""Random kills on a whole cluster while a run is under way: it ends with its target, and no episode is lost or twice.

VLA_DIST_STORM_S is how long parts are killed: 1800 s by default, 240 s as the short form.
"""

import os
import random
import time
from collections import Counter

import jobs
import pytest
from lab import SHARED
from onprem import BOX, HEAD, ROOM, TABLE, write_cluster_file

from vla_dist.replay.archive.archiver import read_archive

pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.timeout(7200)]

_SECONDS = float(os.environ.get("VLA_DIST_STORM_S", "1800"))
_SEED = int(os.environ.get("VLA_DIST_STORM_SEED", "1"))
_PAUSE_S = (4.0, 15.0)
_EPISODES = 4000
_WEIGHTS = {"rollout": 5, "rank": 2, "replica": 3, "controller": 1, "redis": 2, "node": 2, "head": 1}


class Storm:
    """Kills one thing after another, and puts back what no part of the system can: power, and Ray on the head."""

    def __init__(self, lab, head, room, box) -> None:
        self.lab, self.head, self.room, self.box = lab, head, room, box
        self.kills: Counter[str] = Counter()
        self.submitted = 0
        self.job = ""

    def strike(self, what: str) -> None:
        self.kills[what] += 1
        getattr(self, f"_{what}")()

    def submit(self, command: str) -> None:
        self.submitted += 1
        self.job = f"run-{self.submitted}"
        jobs.submit(self.head, self.job, command)

    def keep_running(self) -> bool:
        """Whether the run has ended well; one that lost its driver, or more than it forgives, is taken up again."""
        found = jobs.status(self.head, self.job)
        if found in ("FAILED", "STOPPED"):
            self.resume()
        return found == "SUCCEEDED"

    def resume(self) -> None:
        self.submit(f"vla-dist run babyai --resume {jobs.on_node(jobs.newest_run(self.lab), self.lab)}")

    def _rollout(self) -> None:
        self.room.ssh("pkill -9 -f ray::WorkerHost")

    def _rank(self) -> None:
        self.box.ssh("pkill -9 -f ray::RayTrainWorker")

    def _replica(self) -> None:
        self.box.ssh("pkill -9 -f ray::ServeReplica")

    def _controller(self) -> None:
        self.head.ssh("pkill -9 -f ray::ServeController")

    def _redis(self) -> None:
        self.head.ssh("pkill -9 -f valkey-server.*:6380")

    def _node(self) -> None:
        self.room.kill()
        self.room.start()
        self.room.ssh(f"vla-dist cluster start-worker --head {HEAD} {ROOM}:{TABLE[ROOM]}", timeout_s=180).ok()

    def _head(self) -> None:
        self.head.ssh("pkill -9 -x gcs_server; pkill -9 -x raylet; ray stop --force", timeout_s=90)
        self.head.ssh(f"vla-dist cluster start-head --node-ip {HEAD}", timeout_s=300).ok()
        self.lab.wait_for(
            lambda: jobs.api_answer(self.head, token=True).out == "200", what="jobs API", timeout_s=120, every_s=2
        )
        self.resume()


def test_a_storm_ends_with_the_target_and_a_balanced_ledger(lab):
    head, room, box = lab.add("head", 11), lab.add("room", 12), lab.add("box", 13)
    path = write_cluster_file(lab)
    lab.run(["vla-dist", "cluster", "tokens"]).ok()
    lab.run(["ray", "up", "-y", "--no-config-cache", str(path)], timeout_s=300).ok()
    lab.wait_for(lambda: len(lab.alive_nodes(head)) == 3, what="three nodes", timeout_s=180, every_s=3)
    storm, dice = Storm(lab, head, room, box), random.Random(_SEED)
    # Some ten updates a second on two cores: training lasts about as long as the storm.
    updates = int(10 * _SECONDS)
    storm.submit(
        f"vla-dist run babyai {jobs.options(updates=updates, episodes=_EPISODES)} --runs-dir {SHARED}/runs "
        f"--replay.archive {SHARED}/archive"
    )
    lab.wait_for(lambda: "episodes" in jobs.last_line(head, storm.job), what="the run", timeout_s=180, every_s=3)
    end = time.monotonic() + _SECONDS
    while time.monotonic() < end and not storm.keep_running():
        time.sleep(dice.uniform(*_PAUSE_S))
        what = dice.choices(list(_WEIGHTS), weights=list(_WEIGHTS.values()))[0]
        storm.strike(what)
        print(f"[{_SECONDS - (end - time.monotonic()):5.0f} s] killed: {what}", flush=True)

    lab.wait_for(storm.keep_running, what="end of the run", timeout_s=1800, every_s=5)
    summary = jobs.summary(lab)
    assert summary["updates"] == updates
    archived = [segments[0].episode_id for segments in read_archive(lab.shared / "archive")]
    experts = [name for name in archived if "-policy" not in name]
    print(
        f"kills {dict(storm.kills)}; submitted {storm.submitted}; archived {len(archived)}, {len(experts)} of experts"
    )
    assert summary["archive"]["not_archived"] == 0
    assert len(set(archived)) == len(archived)
    assert len(experts) == _EPISODES
    assert set(lab.alive_nodes(head)) >= {HEAD, ROOM, BOX}
