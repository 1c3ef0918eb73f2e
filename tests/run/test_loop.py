"""The whole system as a person starts it: real Ray, Redis, Serve, gRPC and torch on BabyAI, as a child process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from vla_dist.run.serve_app import free_ports

pytestmark = [pytest.mark.integration, pytest.mark.timeout(280)]

SMALL = (
    *("--rollout.episodes-per-task", "60", "--replay.min-steps", "150", "--evaluation.episodes-per-task", "8"),
    *("--learner.total-updates", "150", "--learner.publish-updates", "0", "50", "100", "150"),
    *("--evaluation.final-episodes-per-task", "20", "--fleet.control-hz", "10", "--min-memory-gib", "2"),
)


def start(tmp_path: Path, *words: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-m", "vla_dist.cli", "run", "babyai", *words]
    log = open(tmp_path / "log.txt", "a")  # noqa: SIM115  lives as long as the child
    return subprocess.Popen(arguments, stdout=log, stderr=log, text=True, cwd=tmp_path, start_new_session=True)


def first_start(tmp_path: Path) -> subprocess.Popen[str]:
    return start(tmp_path, *SMALL, "--serving.port", str(free_ports(1)[0]))


def finish(run: subprocess.Popen[str], tmp_path: Path, *, timeout_s: float) -> dict:
    try:
        code = run.wait(timeout=timeout_s)
    finally:
        run.send_signal(signal.SIGINT) if run.poll() is None else None
    assert code == 0, (tmp_path / "log.txt").read_text()[-3000:]
    (summary,) = tmp_path.glob("runs/*/summary.json")
    return json.loads(summary.read_text())


def descendants(run: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(run.pid).children(recursive=True)


def wait_for(find, *, what: str, tmp_path: Path, timeout_s: float = 100.0):
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if found := find():
            return found
        time.sleep(0.2)
    raise AssertionError(f"no {what} within {timeout_s} s; {(tmp_path / 'log.txt').read_text()[-2000:]}")


def processes_named(run: subprocess.Popen[str], prefix: str) -> list[psutil.Process]:
    found = []
    for process in descendants(run):
        try:
            found += [process] if " ".join(process.cmdline()).startswith(prefix) else []
        except psutil.Error:
            continue
    return found


def log_has(tmp_path: Path, text: str) -> bool:
    return text in (tmp_path / "log.txt").read_text()


def test_the_loop_closes_and_survives_two_kills(tmp_path):
    run = first_start(tmp_path)
    (rollout, *_) = wait_for(
        lambda: processes_named(run, "ray::WorkerHost.run"), what="rollout worker", tmp_path=tmp_path
    )
    os.kill(rollout.pid, signal.SIGKILL)
    (replica, *_) = wait_for(
        lambda: log_has(tmp_path, "robots 1") and processes_named(run, "ray::ServeReplica"),
        what="replica with a robot",
        tmp_path=tmp_path,
    )
    os.kill(replica.pid, signal.SIGKILL)
    everything = descendants(run)
    summary = finish(run, tmp_path, timeout_s=200)

    assert len(summary["versions"]) >= 4
    first, last = summary["versions"][0], summary["versions"][-1]
    assert first["success_mean"] <= 0.25
    assert last["success_mean"] >= 0.5
    assert last["success_interval"][0] > first["success_mean"]
    assert summary["updates"] == 150
    assert summary["served_calls"] > 0
    assert any("rollout-0 died and was started again" in note for note in summary["notes"])
    assert summary["fleet"]["episodes"] >= 1
    assert summary["steps_collected"] > 0
    assert summary["peak_memory_mb"] < 6 * 1024
    assert (tmp_path / "runs").glob("*/learning_curve.png")
    _, alive = psutil.wait_procs(everything, timeout=10)
    assert alive == []


def test_ctrl_c_leaves_no_process_and_resume_goes_on_from_the_checkpoint(tmp_path):
    run = first_start(tmp_path)
    wait_for(lambda: log_has(tmp_path, "version 2"), what="second version", tmp_path=tmp_path)
    everything = descendants(run)
    stopped_at = time.monotonic()
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=40) == 130
    _, alive = psutil.wait_procs(everything, timeout=5)
    assert alive == []
    assert time.monotonic() - stopped_at < 40
    assert not list(tmp_path.glob("runs/*/summary.json"))

    summary = finish(start(tmp_path, "--resume"), tmp_path, timeout_s=200)
    updates = [version["updates"] for version in summary["versions"]]
    assert updates == [0, 50, 100, 150]
    assert summary["updates"] == 150
    stored = [json.loads(path.read_text()) for path in tmp_path.glob("runs/*/config.json")]
    assert len(stored) == 1
