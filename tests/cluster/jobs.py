"""Runs as Ray jobs, through the jobs API on the head's loopback."""

import json
from pathlib import Path

from lab import SHARED, Done, Lab, Node

_API = "http://127.0.0.1:8265/api/jobs/"
SMALL = (
    "--rollout.num-workers 2 --rollout.episodes-per-task 60 --replay.min-steps 150 --fleet.num-robots 0 "
    "--evaluation.episodes-per-task 8 --evaluation.final-episodes-per-task 40 --learner.checkpoint-every-updates 25"
)


def submit(head: Node, name: str, command: str) -> None:
    head.ssh(f"ray job submit --submission-id {name} --no-wait -- {command}", timeout_s=120).ok()


def status(head: Node, name: str) -> str:
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED; empty while the API does not answer."""
    done = head.ssh(f'curl -s -m 10 -H "Authorization: Bearer $(cat ~/.ray/auth_token)" {_API}{name}')
    try:
        return json.loads(done.out)["status"]
    except (ValueError, KeyError, TypeError):
        return ""


def log(head: Node, name: str) -> str:
    return head.ssh(f"ray job logs {name}", timeout_s=90).out


def finish(lab: Lab, head: Node, name: str, *, timeout_s: float) -> dict:
    """The summary of the run that succeeded last."""
    over = ("SUCCEEDED", "FAILED", "STOPPED")
    lab.wait_for(lambda: status(head, name) in over, what=f"end of {name}", timeout_s=timeout_s, every_s=3.0)
    assert status(head, name) == "SUCCEEDED", log(head, name)[-4000:]
    return json.loads(newest_run(lab).joinpath("summary.json").read_text())


def newest_run(lab: Lab) -> Path:
    return max((lab.shared / "runs").glob("*/config.json"), key=lambda path: path.stat().st_mtime).parent


def on_node(path: Path, lab: Lab) -> str:
    """How a node calls a path of the shared file system."""
    return f"{SHARED}/{path.relative_to(lab.shared)}"


def api_answer(head: Node, *, token: bool) -> Done:
    header = '-H "Authorization: Bearer $(cat ~/.ray/auth_token)"' if token else ""
    return head.ssh(f"curl -s -m 10 -o /dev/null -w '%{{http_code}}' {header} {_API}")
