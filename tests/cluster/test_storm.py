"""Random kills on a whole cluster while a run is under way: it ends with its target, and no episode is lost or twice.

VLA_DIST_STORM_S is how long parts are killed: 1800 s by default.
"""

import os
import random
import time

import jobs
import pytest
from lab import SHARED
from onprem import BOX, HEAD, ROOM, write_cluster_file
from storm import VICTIMS, Storm, require_balance

pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.timeout(7200)]

_SECONDS = float(os.environ.get("VLA_DIST_STORM_S", "1800"))
_SEED = int(os.environ.get("VLA_DIST_STORM_SEED", "1"))
_PAUSE_S = (4.0, 15.0)
_EPISODES = 1500
# Large batches: an update takes long enough that few of them outlast the storm.
_PACE = "--learner.batch-size 256 --replay.samples-per-insert 160"


def test_a_storm_ends_with_the_target_and_a_balanced_ledger(lab):
    head, room, box = lab.add("head", 11), lab.add("room", 12), lab.add("box", 13)
    path = write_cluster_file(lab)
    lab.run(["vla-dist", "cluster", "tokens"]).ok()
    lab.run(["ray", "up", "-y", "--no-config-cache", str(path)], timeout_s=300).ok()
    lab.wait_for(lambda: len(lab.alive_nodes(head)) == 3, what="three nodes", timeout_s=400, every_s=3)
    storm, dice = Storm(lab, head=head, room=room, box=box), random.Random(_SEED)
    updates = int(3 * _SECONDS)
    storm.submit(
        f"vla-dist run babyai {jobs.options(updates=updates, episodes=_EPISODES)} {_PACE} --runs-dir {SHARED}/runs "
        f"--replay.archive {SHARED}/archive"
    )
    lab.wait_for(lambda: "collected" in jobs.log(head, storm.job), what="the run", timeout_s=300, every_s=3)
    began = time.monotonic()
    # Each of them once, then by weight.
    plan = dice.sample(list(VICTIMS), len(VICTIMS))
    while time.monotonic() - began < _SECONDS and not storm.keep_running():
        time.sleep(dice.uniform(*_PAUSE_S))
        what = plan.pop() if plan else dice.choices(list(VICTIMS), weights=list(VICTIMS.values()))[0]
        said = "killed" if storm.strike(what) else "was not there"
        print(f"[{time.monotonic() - began:5.0f} s] {what} {said}; {jobs.last_line(head, storm.job)}", flush=True)
    print(f"{time.monotonic() - began:.0f} s of storm", flush=True)

    lab.wait_for(storm.keep_running, what="end of the run", timeout_s=1800, every_s=5)
    assert jobs.summary(lab)["updates"] == updates
    assert jobs.summary(lab)["archive"]["not_archived"] == 0
    balance = require_balance(lab, experts=_EPISODES)
    print(f"{time.monotonic() - began:.0f} s to the end; kills {dict(storm.kills)}; {storm.submitted} jobs; {balance}")
    assert set(lab.alive_nodes(head)) >= {HEAD, ROOM, BOX}
