"""The storm's short form: each part of a cluster that can be lost without a person is killed once, at work."""

import jobs
import pytest
from lab import SHARED
from onprem import BOX, HEAD, ROOM, start_by_hand
from storm import Storm, require_balance

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

_UPDATES, _EPISODES = 300, 150
_OPTIONS = (
    "--rollout.num-workers 2 --replay.min-steps 150 --fleet.num-robots 0 --learner.checkpoint-every-updates 50 "
    f"--rollout.episodes-per-task {_EPISODES} --learner.total-updates {_UPDATES} "
    f"--learner.publish-updates 0 {_UPDATES} --evaluation.episodes-per-task 4 --evaluation.final-episodes-per-task 4 "
    f"--runs-dir {SHARED}/runs --replay.archive {SHARED}/archive"
)


def test_a_short_storm_ends_with_the_target_and_a_balanced_ledger(lab, milestone):
    head, room, box = start_by_hand(lab)
    milestone("three nodes")
    storm = Storm(lab, head=head, room=room, box=box)
    storm.submit(f"vla-dist run babyai {_OPTIONS}")

    def kill(what, *, once):
        lab.wait_for(once, what=f"{what} at work", timeout_s=240, every_s=1)
        storm.strike(what)
        milestone(f"killed: {what}")

    def at_work(node, name):
        return lambda: node.pids(name)

    kill("rollout", once=at_work(room, "ray::WorkerHost"))
    kill("node", once=at_work(room, "ray::WorkerHost"))
    kill("redis", once=at_work(room, "ray::WorkerHost"))
    kill("rank", once=lambda: list(lab.shared.glob("runs/*/checkpoints/*/update-*")))
    kill("replica", once=at_work(box, "ray::ServeReplica"))
    kill("controller", once=at_work(head, "ray::ServeController"))
    lab.wait_for(storm.keep_running, what="end of the run", timeout_s=600, every_s=2)
    milestone("the run has ended")
    assert storm.submitted == 1
    assert set(storm.kills) == {"rollout", "redis", "rank", "replica", "controller", "node"}
    assert jobs.summary(lab)["updates"] == _UPDATES
    assert jobs.summary(lab)["archive"]["not_archived"] == 0
    print(require_balance(lab, experts=_EPISODES), flush=True)
    assert set(lab.alive_nodes(head)) >= {HEAD, ROOM, BOX}
