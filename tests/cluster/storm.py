"""Random kills on a lab's cluster while a run is under way, and its ledger of episodes."""

from collections import Counter

import jobs
from lab import Lab, Node
from onprem import start_head, start_worker

from vla_dist.replay.archive.archiver import read_archive

VICTIMS = {
    "rollout": 5,
    "rank": 2,
    "replica": 3,
    "controller": 1,
    "redis": 2,
    "ray_redis": 1,
    "node": 2,
    "head": 1,
}
"""What is killed -> how often, relative to the others."""


class Storm:
    """Kills one thing after another, and puts back what no part of the system can: power, and Ray on the head."""

    def __init__(self, lab: Lab, *, head: Node, room: Node, box: Node) -> None:
        self.lab, self.head, self.room, self.box = lab, head, room, box
        self.kills: Counter[str] = Counter()
        self.missed: Counter[str] = Counter()
        """Nothing of the kind was there: a part that is between two lives."""
        self.submitted = 0
        self.job = ""

    def strike(self, what: str) -> bool:
        """Whether there was one of them."""
        found = getattr(self, f"_{what}")()
        (self.kills if found else self.missed)[what] += 1
        return found

    def submit(self, command: str) -> None:
        self.submitted += 1
        self.job = f"run-{self.submitted}"
        jobs.submit(self.head, self.job, command)

    def keep_running(self) -> bool:
        """Whether the run has ended well; one that lost its driver, or more than it forgives, is taken up again."""
        found = jobs.status(self.head, self.job)
        if found in ("FAILED", "STOPPED"):
            print(f"{self.job} {found}: {jobs.log(self.head, self.job).strip()[-500:]}", flush=True)
            self.resume()
        return found == "SUCCEEDED"

    def resume(self) -> None:
        self.submit(f"vla-dist run babyai --resume {jobs.on_node(jobs.newest_run(self.lab), self.lab)}")

    def _rollout(self) -> bool:
        return self.room.kill_all("ray::WorkerHost")

    def _rank(self) -> bool:
        return self.box.kill_all("ray::RayTrainWorker")

    def _replica(self) -> bool:
        return self.box.kill_all("ray::ServeReplica")

    def _controller(self) -> bool:
        return self.head.kill_all("ray::ServeController")

    def _redis(self) -> bool:
        return self.head.kill_all("valkey-server.*:6380")

    def _ray_redis(self) -> bool:
        """Ray's control service ends with its store: the head has to be started again."""
        found = self.head.kill_all("valkey-server.*:6381")
        self.lab.wait_for(
            lambda: not self.head.pids("/gcs_server "), what="end of the control service", timeout_s=240, every_s=1
        )
        self._start_head()
        return found

    def _node(self) -> bool:
        self.room.kill()
        self.room.start()
        start_worker(self.room)
        return True

    def _head(self) -> bool:
        self.head.ssh("pkill -9 -x gcs_server; pkill -9 -x raylet; ray stop --force", timeout_s=240)
        self._start_head()
        return True

    def _start_head(self) -> None:
        start_head(self.head)
        self.lab.wait_for(
            lambda: jobs.api_answer(self.head, token=True).out == "200", what="jobs API", timeout_s=300, every_s=2
        )
        if jobs.status(self.head, self.job) != "SUCCEEDED":
            self.resume()


def require_balance(lab: Lab, *, experts: int) -> str:
    """Every episode that experts were to collect is in the archive, and none of any kind twice. Says what was found."""
    archived = [segments[0].episode_id for segments in read_archive(lab.shared / "archive")]
    found = [name for name in archived if "-policy" not in name]
    assert len(set(archived)) == len(archived)
    assert len(found) == experts
    return f"archived {len(archived)}, {len(found)} of experts"
