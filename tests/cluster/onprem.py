"""The on-premises cluster file with the lab's addresses in it, and the same cluster without `ray up`."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lab import CHECKOUT, NETWORK, VENV, Lab, Node

from vla_dist.run.node import write_tokens

HEAD, ROOM, BOX, ADDED = (f"{NETWORK}.{last}" for last in (11, 12, 13, 14))
TABLE = {ROOM: "rollout=3,cpu=3", BOX: "learner=1,serving=1,cpu=2", ADDED: "rollout=3,cpu=3"}


def write_cluster_file(lab: Lab) -> Path:
    """cluster/onprem.yaml as somebody edits it for three machines: a head, a robots' room and a GPU box."""
    text = (CHECKOUT / "cluster" / "onprem.yaml").read_text()
    edits = {
        "192.168.10.10": HEAD,
        "[192.168.10.11, 192.168.10.12, 192.168.10.20]": f"[{ROOM}, {BOX}]",
        "192.168.10.11:rollout=8": f"{ROOM}:{TABLE[ROOM]}",
        "        192.168.10.12:rollout=8\n": "",
        "192.168.10.20:learner=1,serving=2": f"{BOX}:{TABLE[BOX]}",
        "ssh_user: robot": "ssh_user: root",
        "~/.ssh/id_ed25519": str(lab.key),
        "cluster_name: vla-dist": f"cluster_name: {lab.name('onprem')}",
    }
    for old, new in edits.items():
        assert old in text, f"cluster/onprem.yaml has no {old!r} any more"
        text = text.replace(old, new)
    path = lab.folder / "onprem.yaml"
    path.write_text(text)
    return path


def start_by_hand(lab: Lab) -> tuple[Node, Node, Node]:
    """What `ray up` makes of that file, in a third of its time: head, room and box."""
    write_tokens(lab.home)
    head, room, box = nodes = (lab.add("head", 11), lab.add("room", 12), lab.add("box", 13))
    _at_once(_set_up, nodes)
    start_head(head)
    _at_once(start_worker, (room, box))
    return head, room, box


def start_head(head: Node) -> None:
    head.ssh(f"vla-dist cluster start-head --node-ip {HEAD}", timeout_s=400).ok()


def start_worker(node: Node) -> None:
    words = f"vla-dist cluster start-worker --head {HEAD} {node.address}:{TABLE[node.address]}"
    node.ssh(words, timeout_s=300).ok()


def drive_outside(lab: Lab, robots: Node, address: str, seconds: float, *, token: str) -> dict[str, Any]:
    """What became of robots on a machine that is not of the cluster; see ``fleet_program``."""
    program = CHECKOUT / "tests" / "cluster" / "fleet_program.py"
    words = [f"{VENV}/bin/python", str(program), f"{address}:9000", token, str(seconds)]
    done = lab.run(words, inside=robots.namespace, timeout_s=seconds + 240)
    return json.loads(done.ok().out.strip().splitlines()[-1])


def _set_up(node: Node) -> None:
    home = node.root / "home"
    for tokens in (".ray", ".vla-dist"):
        shutil.copytree(node.lab.home / tokens, home / tokens, dirs_exist_ok=True)
    excluded = [word for name in (".git", ".venv*", "__pycache__") for word in ("--exclude", name)]
    subprocess.run(["rsync", "-a", *excluded, f"{CHECKOUT}/", str(home / "vla-dist")], check=True, timeout=60)
    node.ssh("bash ~/vla-dist/cluster/setup.sh").ok()


def _at_once(act: Callable[[Node], None], nodes: Iterable[Node]) -> None:
    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(act, node) for node in nodes]:
            done.result()
