"""The life of an on-premises cluster, on machines of network namespaces, with nothing of it replaced."""

import re

import dashboards
import jobs
import pytest
from lab import CHECKOUT, SHARED
from onprem import ADDED, BOX, HEAD, ROOM, TABLE, drive_outside, write_cluster_file

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2400)]


def exported(lab, *nodes):
    """Names of all metrics of these nodes."""
    pages = [lab.run(["curl", "-s", "-m", "10", f"http://{node.address}:8080/metrics"]).out for node in nodes]
    return {line.split()[2] for page in pages for line in page.splitlines() if line.startswith("# HELP")}


def test_a_cluster_lives_through_a_run_its_losses_and_its_end(lab, milestone):
    head, room, box = lab.add("head", 11), lab.add("room", 12), lab.add("box", 13)
    robots = lab.add("robots", 50, has_sshd=False)
    path = write_cluster_file(lab)

    # Without tokens nothing is launched; with them the file is in order.
    refused = lab.run(["vla-dist", "cluster", "check", str(path), "--preset", "babyai"])
    assert refused.code == 1
    assert "run 'vla-dist cluster tokens'" in refused.out
    lab.run(["vla-dist", "cluster", "tokens"]).ok()
    assert "ready to launch" in lab.run(["vla-dist", "cluster", "check", str(path), "--preset", "babyai"]).ok().out

    lab.run(["ray", "up", "-y", "--no-config-cache", str(path)], timeout_s=300).ok()
    lab.wait_for(lambda: len(lab.alive_nodes(head)) == 3, what="three nodes", timeout_s=300, every_s=3)
    milestone("three nodes")
    assert jobs.api_answer(head, token=False).out == "401"
    assert jobs.api_answer(head, token=True).out == "200"

    watch = dashboards.Watch(lab, head)
    jobs.submit(head, "first", f"vla-dist run babyai {jobs.options()} --runs-dir {SHARED}/runs")
    token = (lab.home / ".vla-dist" / "fleet_token").read_text()

    def fleet(address, seconds, *, secret=token):
        return drive_outside(lab, robots, address, seconds, token=secret)

    def actors(kind):
        found = (
            "[(a['Address']['NodeID'], a['State']) for a in state.actor_table(None, actor_state_name='ALIVE').values()"
        )
        program = (
            "from ray._private.state import state; where = "
            "{n['NodeID']: n['NodeManagerAddress'] for n in ray.nodes()}; "
            f"print(json.dumps(sorted(where[n] for n, _ in {found} if '{kind}' in a['ActorClassName']])))"
        )
        return lab.ask(head, program)

    # Each part is where its role is.
    lab.wait_for(lambda: len(actors("WorkerHost")) == 2, what="rollout workers", timeout_s=360, every_s=5)
    assert set(actors("WorkerHost")) == {ROOM}
    lab.wait_for(lambda: actors("RayTrainWorker"), what="learner", timeout_s=360, every_s=5)
    assert set(actors("RayTrainWorker")) == {BOX}
    milestone("parts are placed")

    seen = set()

    def rollouts_moved():
        seen.update(exported(lab, head, box))
        return set(actors("WorkerHost")) == {ADDED}

    # A node joins, and the one with the rollout workers loses its power.
    added = lab.add("added", 14)
    setup = (
        f"rsync -a --exclude .git --exclude '.venv*' {CHECKOUT}/ root@{ADDED}:vla-dist/ -e 'ssh -i {lab.key} -o "
        "StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null' && "
        f"rsync -aR --no-implied-dirs .ray/auth_token .vla-dist/fleet_token root@{ADDED}: -e 'ssh -i {lab.key} -o "
        "StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null'"
    )
    added.ssh("mkdir -p .ray .vla-dist").ok()
    lab.run(["bash", "-c", setup], cwd=lab.home).ok()
    added.ssh("bash ~/vla-dist/cluster/setup.sh").ok()
    added.ssh(f"vla-dist cluster start-worker --head {HEAD} {ADDED}:{TABLE[ADDED]}", timeout_s=300).ok()
    room.kill()
    milestone("one node added, one killed")
    lab.wait_for(rollouts_moved, what="rollout workers on the added node", timeout_s=360, every_s=5)
    milestone("rollouts go on on the added node")

    # Robots outside reach the gateway with the token, and only with it.
    lab.wait_for(lambda: "] training" in jobs.last_line(head, "first"), what="training", timeout_s=360, every_s=3)
    told = fleet(HEAD, 15)
    assert told["calls"] > 20, told
    assert told["failed_calls"] == 0, told
    milestone("robots outside are served")
    # Versions are judged when rollouts have ended; the learner's metrics go with its process.
    seen |= exported(lab, head, box)
    assert dashboards.metrics() - seen <= {"ray_vla_dist_run_success"}
    stranger = fleet(HEAD, 3, secret="wrong")
    assert stranger["troubles"] > 0, stranger
    assert "token" in stranger["trouble"][0], stranger

    # The head's Ray is killed; robots at the box do not notice; what Ray knew is there again.
    lab.wait_for(lambda: list(jobs.newest_run(lab).glob("checkpoints/*/update-*")), what="a checkpoint", timeout_s=360)
    before = actors("ServeReplica")
    replica = box.pids("ray::ServeReplica")
    head.ssh("pkill -9 -x gcs_server; pkill -9 -x raylet; ray stop --force", timeout_s=240)
    milestone("head killed")
    told = fleet(BOX, 10)
    assert told["calls"] > 10, told
    head.ssh(f"vla-dist cluster start-head --node-ip {HEAD}", timeout_s=300).ok()
    lab.wait_for(lambda: len(lab.alive_nodes(head)) == 3, what="three nodes again", timeout_s=300, every_s=3)
    # Nodes are listed before what runs on them; that it is the same process says that it never left.
    lab.wait_for(lambda: actors("ServeReplica") == before == [BOX], what="replica again", timeout_s=300, every_s=3)
    assert box.pids("ray::ServeReplica") == replica != []
    milestone("head is back, the replica never left")
    # The gateway of the head had been killed with it, and what it left behind does not stand in the way.
    told = fleet(HEAD, 30)
    assert told["calls"] > 10, told
    milestone("robots are served through the head again")

    run = jobs.on_node(jobs.newest_run(lab), lab)
    jobs.submit(head, "second", f"vla-dist run babyai --resume {run}")
    summary = jobs.finish(lab, head, "second", timeout_s=900)
    milestone("the run has ended with its target")
    assert [version["updates"] for version in summary["versions"]] == jobs.MILESTONES
    assert summary["versions"][-1]["success_mean"] > summary["versions"][0]["success_mean"]

    shown, troubled = watch.look(), watch.rules_in_trouble()
    lab.run(["ray", "down", "-y", str(path)], timeout_s=200).ok()
    pattern = re.compile(r"ray|valkey|redis|vla-dist|haproxy|vla_dist")

    def left():
        found = {}
        for node in (head, box, added):
            lines = node.ssh("ps -eo pid,args --no-headers").out.splitlines()
            # The first process is the lab's own.
            rest = [line for line in lines if pattern.search(line) and line.split()[0] != "1"]
            found |= {node.name: rest} if rest else {}
        return found

    # Nodes wait three minutes for their head to come back.
    lab.wait_for(lambda: not left(), what="clean nodes", timeout_s=400, every_s=10)
    milestone("nothing is left")
    assert (lab.nodes["head"].root / "home/.vla-dist/store/replay/appendonlydir").is_dir()
    assert troubled == []
    # Versions are judged when rollouts have ended; the second run's success may be younger than the last scrape.
    assert {panel.title for panel, series in shown if not series} <= {"success on unseen seeds"}
