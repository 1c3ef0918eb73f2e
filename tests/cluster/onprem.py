"""The on-premises cluster file with the lab's addresses in it."""

from pathlib import Path

from lab import CHECKOUT, NETWORK, Lab

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
