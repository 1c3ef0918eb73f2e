"""The root's ray_cluster.yaml launches nodes, runs a job on them and terminates them, in a cloud without a way out."""

import re

import cloud
import jobs
import pytest
from lab import SHARED

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2400)]


@pytest.fixture
def fake_cloud(lab):
    if reason := cloud.why_not():
        pytest.skip(reason)
    pytest.importorskip("boto3", reason="the launcher's Ray needs boto3")
    one = cloud.Cloud(lab)
    yield one
    one.close()


def test_the_root_file_launches_runs_and_terminates(lab, fake_cloud, milestone):
    path = fake_cloud.write_cluster_file(fake_cloud.prepare())
    lab.run(["vla-dist", "cluster", "tokens"]).ok()
    checked = lab.run(["vla-dist", "cluster", "check", str(path), "--preset", "babyai"], env=fake_cloud.environment())
    assert "ready to launch" in checked.ok().out

    lab.require_isolation()
    up = lab.run(["ray", "up", "-y", "--no-config-cache", str(path)], timeout_s=300, env=fake_cloud.environment())
    assert not fake_cloud.trouble
    up.ok()
    (head,) = fake_cloud.machines.values()
    milestone("head is up")
    jobs.submit(head, "run", f"vla-dist run babyai {jobs.options()} --runs-dir {SHARED}/runs")
    # Nothing but the head is there: the slots that the run asks for make the autoscaler launch one node of each kind.
    lab.wait_for(lambda: len(fake_cloud.machines) == 4, what="four instances", timeout_s=500, every_s=2)
    milestone("the autoscaler launched a node of each kind")
    assert sorted(fake_cloud.launched) == ["c6i.4xlarge", "g4dn.xlarge", "g5.2xlarge", "r6i.2xlarge"]

    # The spot node is taken away in the middle of its work, and another one takes its place.
    spot = next(a for a, kind in fake_cloud.kinds.items() if kind == "c6i.4xlarge")
    lab.wait_for(
        lambda: re.search(r"collected [1-9][\d,]* steps", jobs.log(head, "run")),
        what="episodes",
        timeout_s=500,
        every_s=4,
    )
    fake_cloud.terminate(spot)
    lab.wait_for(lambda: spot not in fake_cloud.machines, what="preemption", timeout_s=180)
    milestone("the spot node is gone")
    lab.wait_for(lambda: len(fake_cloud.machines) == 4, what="its replacement", timeout_s=500, every_s=2)
    milestone("another spot node takes its place")
    assert fake_cloud.launched.count("c6i.4xlarge") == 2
    summary = jobs.finish(lab, head, "run", timeout_s=900)
    milestone("the run has ended with its target")
    assert any("lost its node" in note for note in summary["notes"])
    assert [version["updates"] for version in summary["versions"]] == jobs.MILESTONES

    lab.run(["ray", "down", "-y", str(path)], timeout_s=200, env=fake_cloud.environment()).ok()
    lab.wait_for(lambda: not fake_cloud.machines, what="empty cloud", timeout_s=240, every_s=2)
    milestone("every instance is terminated")
