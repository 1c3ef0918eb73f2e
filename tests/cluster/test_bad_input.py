"""What a run on a cluster refuses when it starts: one sentence that says what to do, and nothing is left running."""

import jobs
import pytest
from lab import NETWORK, SHARED
from onprem import BOX, start_by_hand

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

_NOBODY = f"{NETWORK}.99"
REFUSED = {
    "slots": ("--serving.num-replicas 5", "5 slots of the role 'serving' are wanted"),
    "gpus": ("--learner.use-gpu True", "1 GPUs are wanted and the cluster has at most 0"),
    "redis": (f"--replay.redis-url redis://{_NOBODY}:6379", f"{_NOBODY}:6379"),
    "folder": ("--runs-dir /tmp/runs", f"node {BOX} is to train and does not see /tmp/runs"),
    "preset": ("--rollout.num-wokers 2", "num-wokers"),
}
"""What is wrong -> options of a run, and what its last words have in them."""


def test_a_run_that_cannot_work_is_refused_in_one_sentence(lab):
    head, _, box = start_by_hand(lab)
    over = ("SUCCEEDED", "FAILED", "STOPPED")

    def last_words(name, options):
        folder = "" if "--runs-dir" in options else f"--runs-dir {SHARED}/runs"
        jobs.submit(head, name, f"vla-dist run babyai {folder} {options}")
        lab.wait_for(lambda: jobs.status(head, name) in over, what=f"end of {name}", timeout_s=400, every_s=1)
        assert jobs.status(head, name) == "FAILED"
        # The jobs API has the log a moment later.
        said = lab.wait_for(lambda: jobs.log(head, name), what=f"words of {name}", timeout_s=120)
        print(f"{name}: {said.strip()}", flush=True)
        assert "Traceback" not in said
        return said

    heard = {name: last_words(name, options) for name, (options, _) in REFUSED.items()}
    assert {name: text for name, text in heard.items() if REFUSED[name][1] not in text} == {}

    # Another release on one node, which is as little as one file.
    box.ssh("echo '# other' >> ~/vla-dist/vla_dist/core/errors.py").ok()
    said = last_words("release", "")
    assert f"node {BOX} has vla-dist " in said
    assert "install the same on all nodes (cluster/setup.sh)" in said
    assert not [*head.pids("ray::WorkerHost"), *box.pids("ray::ServeReplica"), *box.pids("ray::RayTrainWorker")]
