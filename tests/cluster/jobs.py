"""Runs as Ray jobs, through the jobs API on the head's loopback."""

import json
from pathlib import Path

from lab import SHARED, Done, Lab, Node

_API = "http://127.0.0.1:8265/api/jobs/"
MILESTONES = [0, 600, 1200, 2400]


def options(*, updates: int = MILESTONES[-1], episodes: int = 3000) -> str:
    """Of the preset babyai: long enough that its parts can be killed at work."""
    milestones = MILESTONES if updates == MILESTONES[-1] else [0, updates]
    return (
        f"--rollout.num-workers 2 --rollout.episodes-per-task {episodes} --replay.min-steps 150 --fleet.num-robots 0 "
        f"--learner.total-updates {updates} --learner.publish-updates {' '.join(map(str, milestones))} "
        "--learner.checkpoint-every-updates 100 --evaluation.episodes-per-task 8 "
        "--evaluation.final-episodes-per-task 40"
    )


def submit(head: Node, name: str, command: str) -> None:
    head.ssh(f"ray job submit --submission-id {name} --no-wait -- {command}", timeout_s=300).ok()


def status(head: Node, name: str) -> str:
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED; empty while the API does not answer."""
    return _get(head, name, "status")


def log(head: Node, name: str) -> str:
    return _get(head, f"{name}/logs", "logs")


def last_line(head: Node, name: str) -> str:
    return (log(head, name).strip().splitlines() or [""])[-1]


def _get(head: Node, path: str, key: str) -> str:
    done = head.ssh(f'curl -s -m 10 -H "Authorization: Bearer $(cat ~/.ray/auth_token)" {_API}{path}')
    try:
        return str(json.loads(done.out)[key])
    except (ValueError, KeyError, TypeError):
        return ""


def finish(lab: Lab, head: Node, name: str, *, timeout_s: float) -> dict:
    """The summary of the run that succeeded last."""
    over = ("SUCCEEDED", "FAILED", "STOPPED")
    lab.wait_for(lambda: status(head, name) in over, what=f"end of {name}", timeout_s=timeout_s, every_s=3.0)
    assert status(head, name) == "SUCCEEDED", log(head, name)[-4000:]
    return summary(lab)


def summary(lab: Lab) -> dict:
    return json.loads(newest_run(lab).joinpath("summary.json").read_text())


def newest_run(lab: Lab) -> Path:
    return max((lab.shared / "runs").glob("*/config.json"), key=lambda path: path.stat().st_mtime).parent


def on_node(path: Path, lab: Lab) -> str:
    """How a node calls a path of the shared file system."""
    return f"{SHARED}/{path.relative_to(lab.shared)}"


def api_answer(head: Node, *, token: bool) -> Done:
    header = '-H "Authorization: Bearer $(cat ~/.ray/auth_token)"' if token else ""
    return head.ssh(f"curl -s -m 10 -o /dev/null -w '%{{http_code}}' {header} {_API}")
