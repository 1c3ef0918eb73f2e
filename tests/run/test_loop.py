"""The whole system as a person starts it: real Ray, Redis, Serve, gRPC and torch on BabyAI, as a child process."""

import json
import os
import signal
import time

import psutil
import pytest

from vla_dist.replay.archive.archiver import read_archive
from vla_dist.run.serve_app import free_ports

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]


def start_small(child, *more, milestones=(0, 100, 200, 300), final_episodes=40):
    child.start(
        "babyai",
        *("--rollout.episodes-per-task", "60", "--replay.min-steps", "150", "--evaluation.episodes-per-task", "8"),
        *("--learner.total-updates", str(milestones[-1]), "--learner.publish-updates", *map(str, milestones)),
        *("--learner.checkpoint-every-updates", "50", "--evaluation.final-episodes-per-task", str(final_episodes)),
        *("--fleet.control-hz", "10", "--min-memory-gib", "2", "--serving.port", str(free_ports(1)[0])),
        *more,
    )


def test_the_loop_closes_and_survives_three_kills(child, tmp_path):
    start_small(child)
    # Ray names a process after what it does; between two calls, and beside `run`, after neither.
    (rollout, *_) = child.wait_for(
        lambda: child.named("ray::WorkerHost", but="ray::WorkerHost.__init__"), what="rollout worker"
    )
    os.kill(rollout.pid, signal.SIGKILL)
    (replica, *_) = child.wait_for(
        lambda: "robots 1" in child.log and child.named("ray::ServeReplica"), what="replica with a robot"
    )
    os.kill(replica.pid, signal.SIGKILL)
    # The learner trains by now, from the replay that goes away under it.
    child.wait_for(lambda: list(tmp_path.glob("runs/*/checkpoints/*/update-*")), what="first checkpoint")
    (redis,) = child.wait_for(lambda: child.serving(tmp_path), what="Redis")
    os.kill(redis.pid, signal.SIGKILL)
    everything = child.descendants()
    summary = child.finish(timeout_s=250)

    assert [version["updates"] for version in summary["versions"]] == [0, 100, 200, 300]
    first, last = summary["versions"][0], summary["versions"][-1]
    # Sixty demonstrations end near 0.7; of 40 episodes fewer than 16 succeed then once in ten thousand runs.
    assert last["success_interval"][0] > first["success_mean"]
    assert last["success_mean"] >= 0.4
    assert summary["updates"] == 300
    assert summary["fleet"]["episodes"] >= 1
    assert summary["served_calls"] > summary["served_calls_failed"]
    assert any("rollout-0 died and was started again" in note for note in summary["notes"])
    assert any("redis died and was started again (1 so far)" in note for note in summary["notes"])
    assert summary["peak_memory_mb"] < 6 * 1024
    assert list(tmp_path.glob("runs/*/learning_curve.png"))
    _, alive = psutil.wait_procs(everything, timeout=10)
    assert alive == []


def interrupt(child, *, within_s):
    """Ctrl-C, and nothing of the run is left."""
    everything = child.descendants()
    stopped_at = time.monotonic()
    child.process.send_signal(signal.SIGINT)
    assert child.process.wait(timeout=60) == 130, child.log
    assert time.monotonic() - stopped_at < within_s
    _, alive = psutil.wait_procs(everything, timeout=5)
    assert alive == []


def test_ctrl_c_while_serve_starts_does_not_hang(child):
    start_small(child)
    child.wait_for(lambda: child.named("ray::ServeController"), what="Serve controller")
    interrupt(child, within_s=40)


def test_ctrl_c_leaves_no_process_and_resume_goes_on_from_the_checkpoint(child, tmp_path):
    start_small(child, "--replay.archive", "archive", milestones=(0, 50, 100), final_episodes=8)
    child.wait_for(lambda: list(tmp_path.glob("runs/*/checkpoints/*/checkpoint_*")), what="first checkpoint")
    interrupt(child, within_s=30)
    assert not list(tmp_path.glob("runs/*/summary.json"))

    child.start("babyai", "--resume")
    summary = child.finish(timeout_s=250)
    assert [version["updates"] for version in summary["versions"]] == [0, 50, 100]
    assert summary["updates"] == 100
    assert len([json.loads(path.read_text()) for path in tmp_path.glob("runs/*/config.json")]) == 1
    (folder,) = tmp_path.glob("runs/*/archive")
    archived = [episode[0].episode_id for episode in read_archive(folder)]
    assert len(set(archived)) == len(archived) >= 60
    assert summary["archive"] == {"episodes": len(archived), "not_archived": 0}
