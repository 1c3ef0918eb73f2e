"""What docs/operations.md tells operators to do, done: tokens rotated, a backup, an upgrade, a restore."""

import json
import subprocess
import time
from pathlib import Path

import jobs
import pytest
from lab import CHECKOUT, SHARED
from onprem import HEAD, drive_outside, write_cluster_file

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2400)]

_UPDATES = 2_300


def test_a_cluster_is_backed_up_upgraded_and_restored(lab, milestone):
    head, room, box = lab.add("head", 11), lab.add("room", 12), lab.add("box", 13)
    robots = lab.add("robots", 50, has_sshd=False)
    # A checkout of its own, because an upgrade changes it.
    checkout = lab.folder / "checkout"
    kept = ["--exclude", ".git", "--exclude", ".venv*", "--exclude", "runs", "--exclude", "__pycache__"]
    subprocess.run(["rsync", "-a", *kept, f"{CHECKOUT}/", checkout], check=True, timeout=60)
    path = write_cluster_file(lab)
    # The store of the head ends half a minute after Ray instead of three minutes.
    text = path.read_text()
    assert f"--node-ip {HEAD}" in text
    path.write_text(text.replace(f"--node-ip {HEAD}", f"--node-ip {HEAD} --grace-s 40"))
    lab.run(["vla-dist", "cluster", "tokens"]).ok()

    def up():
        lab.run(["ray", "up", "-y", "--no-config-cache", str(path)], timeout_s=300, cwd=checkout).ok()
        lab.wait_for(lambda: len(lab.alive_nodes(head)) == 3, what="three nodes", timeout_s=300, every_s=3)

    up()
    milestone("three nodes")

    def token(name, *, days=365.0):
        words = f"vla-dist token create {SHARED}/tokens.json --name {name} --role operator --days {days}"
        made = head.ssh(words)
        return made.ok().out.strip().splitlines()[-1]

    def fleet(secret, seconds=8):
        return drive_outside(lab, robots, HEAD, seconds, token=secret)

    # Robots have tokens of a file; one takes the place of another without a break.
    old = token("site/1")
    # On an idle machine some four minutes, so that the run is at work when it is stopped.
    options = jobs.options(updates=_UPDATES, episodes=3000).replace("--fleet.num-robots 0", "--fleet.num-robots 1")
    serving = f"--serving.tokens {SHARED}/tokens.json"
    jobs.submit(head, "first", f"vla-dist run babyai {options} {serving} --runs-dir {SHARED}/runs")
    lab.wait_for(lambda: "] training" in jobs.last_line(head, "first"), what="training", timeout_s=600, every_s=3)
    milestone("training")
    assert fleet(old)["calls"] > 10
    new = token("site/2")
    head.ssh(f"vla-dist token revoke {SHARED}/tokens.json --name site/1").ok()
    assert fleet(new)["calls"] > 10
    told = fleet(old, 3)
    assert told["troubles"] > 0
    assert "token" in told["trouble"][0], told
    brief = token("site/3", days=5 / 86400)
    time.sleep(6)
    told = fleet(brief, 3)
    assert "expired" in told["trouble"][0], told
    milestone("a robot's token was rotated")

    run = jobs.newest_run(lab)
    lab.wait_for(lambda: list(run.glob("checkpoints/*/update-*")), what="a checkpoint", timeout_s=600)
    said = head.ssh(f"vla-dist cluster backup {SHARED}/backups/one", timeout_s=300).ok().out
    assert "MiB of" in said
    versions = _versions(head, run, lab)
    assert versions
    milestone("backed up while it runs")

    # The upgrade: another release and other tokens on all nodes, and the same run.
    head.ssh("ray job stop first", timeout_s=300).ok()
    lab.wait_for(lambda: jobs.status(head, "first") == "STOPPED", what="stopped job", timeout_s=300, every_s=2)
    assert not (run / "summary.json").exists(), "the run ended before it could be upgraded"
    release = checkout / "vla_dist" / "__init__.py"
    release.write_text(release.read_text().replace('__version__ = "', '__version__ = "9.'))
    stale = (lab.home / ".ray/auth_token").read_text()
    lab.run(["vla-dist", "cluster", "tokens", "--renew"]).ok()
    up()
    for node in (head, room, box):
        assert "9." in node.ssh("vla-dist --version").ok().out, node.name
        assert node.ssh("cat ~/.ray/auth_token").out.strip() != stale
    api = "http://127.0.0.1:8265/api/jobs/"
    answer = head.ssh(f"curl -s -m 10 -o /dev/null -w '%{{http_code}}' -H 'Authorization: Bearer {stale}' {api}")
    # Ray answers 401 to no token and 403 to a wrong one.
    assert answer.out in ("401", "403")
    milestone("upgraded, with other tokens")
    jobs.submit(head, "second", f"vla-dist run babyai --resume {jobs.on_node(run, lab)}")
    lab.wait_for(lambda: "] training" in jobs.last_line(head, "second"), what="training", timeout_s=600, every_s=3)
    assert fleet(new)["calls"] > 10
    summary = jobs.finish(lab, head, "second", timeout_s=900)
    assert [version["updates"] for version in summary["versions"]] == [0, _UPDATES]
    milestone("the run has ended with its target")

    # Everything of the head's store is lost, and comes back from the backup.
    lab.run(["ray", "down", "-y", str(path)], timeout_s=200).ok()
    refused = head.ssh(f"vla-dist cluster restore {SHARED}/backups/one")
    assert refused.code == 1
    store = "~/.vla-dist/store/replay"
    lab.wait_for(lambda: not head.pids("cluster store"), what="end of the store", timeout_s=300, every_s=3)
    head.ssh(f"rm -r {store}/appendonlydir {store}/client.password").ok()
    assert "has what" in head.ssh(f"vla-dist cluster restore {SHARED}/backups/one", timeout_s=300).ok().out
    up()
    assert _versions(head, run, lab) == versions
    verified = head.ssh(f"vla-dist replay verify --json {jobs.on_node(run, lab)}", timeout_s=200)
    assert verified.code == 0, verified.out[-2000:]
    milestone("restored")
    lab.run(["ray", "down", "-y", str(path)], timeout_s=200).ok()


def _versions(head, run: Path, lab):
    """Of the registry, as files of the head's store say."""
    listed = head.ssh(f"vla-dist registry list --json --run {jobs.on_node(run, lab)}", timeout_s=300).ok().out
    start = min(place for place in (listed.find("["), listed.find("{")) if place >= 0)
    return json.loads(listed[start:])
