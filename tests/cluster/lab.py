"""Machines that are not there: network namespaces on a bridge of their own, each with sshd, home, /tmp and processes.

Nothing in the lab has a route to anywhere else: no default route, and no interface but those made here. Every process
of a node lives in a PID namespace of its own, because `ray stop` kills by name.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

VENV = Path(sys.prefix)
CHECKOUT = Path(__file__).resolve().parents[2]
NETWORK = "10.77.0"
LAUNCHER_IP = f"{NETWORK}.1"
SHARED = "/mnt"
"""A file system that all nodes share, as NFS would be."""
_PROGRAMS = {"ip": "iproute2", "unshare": "util-linux", "/usr/sbin/sshd": "openssh-server", "rsync": "rsync"}

_NO_TERMINAL = ("bash: cannot set terminal process group", "bash: no job control in this shell")

_INIT = """
set -e
mount --make-rprivate /
hostname {name}
mkdir -p {root}/home {root}/tmp {root}/opt
{keep_python}
mount --rbind {root}/home /root
mount --rbind {root}/opt /opt
mount --bind {root}/hosts /etc/hosts
mount --bind {shared} {SHARED}
mount -t tmpfs -o size=4g tmpfs /dev/shm
ln -sfn {venv} /opt/vla-dist
mount -t tmpfs tmpfs /run
mkdir /run/sshd
# Last: the checkout under test may lie in /tmp.
mount --rbind {root}/tmp /tmp
cd /root
/usr/sbin/sshd -D -f {etc}/sshd_config &
# This shell is the first process of its namespace: it reaps what others leave behind.
while true; do wait -n 2>/dev/null || sleep 1; done
"""


_COVERED = {Path("/root"): "home", Path("/opt"): "opt", Path("/tmp"): "tmp"}
"""Folders of this machine that each node has of its own -> where in the node's."""


def _keep_python(root: Path) -> str:
    """Commands that let a node see this machine's Python where a folder of its own would cover it."""
    lines = []
    for path in dict.fromkeys(Path(one).resolve() for one in (sys.base_prefix, VENV)):
        for covered, own in _COVERED.items():
            if path.is_relative_to(covered):
                place = root / own / path.relative_to(covered)
                lines.append(f"mkdir -p {place}; mount --rbind {path} {place}")
    return "\n".join(lines)


def why_not() -> str:
    """What this machine lacks for a lab; empty: nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [package for program, package in _PROGRAMS.items() if not shutil.which(program)]
    if missing:
        return f"install {' '.join(sorted(set(missing)))} (apt-get install -y {' '.join(sorted(set(missing)))})"
    probe = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True)
    return f"no namespaces here: {probe.stderr.strip()}" if probe.returncode else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What a command said."""

    code: int
    out: str

    def ok(self) -> "Done":
        assert self.code == 0, self.out[-4000:]
        return self


class Node:
    """One machine. ``kill`` is the power switch; ``start`` switches it on with the disk it had."""

    def __init__(self, lab: "Lab", name: str, address: str) -> None:
        self.lab, self.name, self.address = lab, name, address
        self.root = lab.folder / name
        self.namespace = lab.name(name)
        self._init: subprocess.Popen[bytes] | None = None
        (self.root / "home").mkdir(parents=True)
        (self.root / "hosts").write_text(f"127.0.0.1 localhost\n{address} {name}\n")

    def start(self, *, has_sshd: bool = True) -> None:
        self.lab.plug(self.namespace, self.address)
        etc = self.lab.folder / "etc" / self.name
        etc.mkdir(parents=True, exist_ok=True)
        (etc / "sshd_config").write_text(
            f"ListenAddress {self.address}\nHostKey {self.lab.host_key}\nAuthorizedKeysFile {self.lab.key}.pub\n"
            "PermitRootLogin prohibit-password\nUsePAM no\nStrictModes no\nPidFile none\nPrintMotd no\nMaxSessions 50\n"
        )
        script = _INIT.format(
            name=self.name,
            root=self.root,
            shared=self.lab.shared,
            SHARED=SHARED,
            venv=VENV.resolve(),
            etc=etc,
            keep_python=_keep_python(self.root),
        )
        if not has_sshd:
            script = script.replace("/usr/sbin/sshd", "true #")
        words = ["ip", "netns", "exec", self.namespace, "unshare", "--mount", "--pid", "--uts", "--ipc", "--fork"]
        self._init = subprocess.Popen([*words, "--mount-proc", "--kill-child", "bash", "-c", script])
        if has_sshd:
            self.lab.wait_for(lambda: self.ssh("true").code == 0, what=f"sshd of {self.name}", timeout_s=120)

    @property
    def is_on(self) -> bool:
        return self._init is not None and self._init.poll() is None

    def kill(self) -> None:
        """kill -9 of everything on it, and its cable pulled."""
        if self._init is not None:
            self._init.kill()
            self._init.wait(timeout=20)
            self._init = None
            self.lab.unplug(self.namespace)

    def ssh(self, command: str, *, timeout_s: float = 180.0) -> Done:
        """As a login shell, like Ray does."""
        words = ["ssh", "-i", str(self.lab.key), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
        words += ["-o", "LogLevel=ERROR", "-o", "ConnectTimeout=60", f"root@{self.address}"]
        done = self.lab.run(
            [*words, f"bash --login -c -i {_quoted('[ ! -f ~/.bashrc ] || source ~/.bashrc; ' + command)} 2>&1"],
            timeout_s=timeout_s,
        )
        lines = [line for line in done.out.splitlines(keepends=True) if not line.startswith(_NO_TERMINAL)]
        return Done(code=done.code, out="".join(lines))

    def pids(self, pattern: str) -> list[int]:
        """Inside the node, of processes whose command line has ``pattern``."""
        done = self.ssh(f"pgrep -f -- {_quoted(_but_itself(pattern))}")
        return [int(line) for line in done.out.split() if line.isdigit()]

    def kill_all(self, pattern: str) -> bool:
        """kill -9 of the processes that ``pids`` finds; whether there were any."""
        return self.ssh(f"pkill -9 -f -- {_quoted(_but_itself(pattern))}").code == 0


class Lab:
    """A bridge without a way out, a launcher on it, and nodes."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="vdl-", dir="/var/tmp"))
        self.shared = self.folder / "shared"
        self.home = self.folder / "launcher"
        self._prefix = f"vdl{os.getpid() % 10_000}"
        self._namespaces: list[str] = []
        self.nodes: dict[str, Node] = {}
        self.key, self.host_key = self.folder / "id_ed25519", self.folder / "host_ed25519"
        for path in (self.shared, self.home):
            path.mkdir()
        for key in (self.key, self.host_key):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        self._hub = self.name("hub")
        _ip("netns", "add", self._hub)
        self._namespaces.append(self._hub)
        self._inside("link", "set", "lo", "up")
        self._inside("link", "add", "br0", "type", "bridge")
        self._inside("addr", "add", f"{LAUNCHER_IP}/24", "dev", "br0")
        self._inside("link", "set", "br0", "up")
        self.require_isolation()

    def name(self, part: str) -> str:
        return f"{self._prefix}-{part}"

    def add(self, name: str, last_octet: int, *, has_sshd: bool = True) -> Node:
        """A machine that is on."""
        node = self.nodes[name] = Node(self, name, f"{NETWORK}.{last_octet}")
        node.start(has_sshd=has_sshd)
        return node

    def plug(self, namespace: str, address: str) -> None:
        outer = f"v{address.rpartition('.')[2]}"
        _ip("netns", "add", namespace)
        self._namespaces.append(namespace)
        self._inside("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        self._inside("link", "set", outer, "master", "br0", "up")
        for words in (("link", "set", "lo", "up"), ("addr", "add", f"{address}/24", "dev", "eth0")):
            _ip("-n", namespace, *words)
        _ip("-n", namespace, "link", "set", "eth0", "up")

    def unplug(self, namespace: str) -> None:
        if namespace != self._hub:
            # With the namespace it would go some time later, and its name could not be given again until then.
            _ip("-n", namespace, "link", "del", "eth0")
        _ip("netns", "del", namespace)
        self._namespaces.remove(namespace)

    def require_isolation(self) -> None:
        """Nothing of the lab may know a way out."""
        routes = self.run(["ip", "route", "show"]).ok().out
        assert "default" not in routes, routes
        assert "via" not in routes, routes

    def run(
        self,
        words: Sequence[str],
        *,
        timeout_s: float = 180.0,
        env: Mapping[str, str] | None = None,
        inside: str = "",
        cwd: Path = CHECKOUT,
    ) -> Done:
        """On the launcher, or with ``inside`` in the network of a node."""
        command = ["ip", "netns", "exec", inside or self._hub, *words]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout_s,
                env=self.environment() | dict(env or {}),
                cwd=cwd,
            )
        except subprocess.TimeoutExpired as error:
            return Done(code=124, out=(error.stdout or b"").decode(errors="replace"))
        return Done(code=done.returncode, out=done.stdout)

    def environment(self) -> dict[str, str]:
        """Of the launcher: a laptop with a home of its own, and no Ray."""
        kept = {name: os.environ[name] for name in ("LANG", "TERM") if name in os.environ}
        return kept | {
            "HOME": str(self.home),
            "PATH": f"{VENV}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH": str(CHECKOUT),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "OMP_NUM_THREADS": "1",
        }

    def wait_for(self, condition, *, what: str, timeout_s: float, every_s: float = 0.5):
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if found := condition():
                return found
            time.sleep(every_s)
        raise AssertionError(f"no {what} within {timeout_s} s")

    def ask(self, node: Node, program: str, *, timeout_s: float = 240.0):
        """What a Python program that joined the cluster on ``node`` prints as a line of JSON."""
        code = f"import json, ray; ray.init(address='auto', log_to_driver=False, logging_level='error'); {program}"
        done = node.ssh(f"python -c {_quoted(code)}", timeout_s=timeout_s).ok()
        # Ray's own words may stand before and after it.
        for line in reversed(done.out.splitlines()):
            with contextlib.suppress(ValueError):
                return json.loads(line)
        raise AssertionError(f"no JSON in {done.out[-2000:]}")

    def alive_nodes(self, node: Node) -> list[str]:
        """Addresses, as Ray on ``node`` sees them."""
        program = "print(json.dumps([n['NodeManagerAddress'] for n in ray.nodes() if n['Alive']]))"
        with contextlib.suppress(AssertionError):
            return sorted(self.ask(node, program))
        return []

    def close(self) -> None:
        for node in self.nodes.values():
            node.kill()
        for namespace in list(self._namespaces):
            for pid in subprocess.run(
                ["ip", "netns", "pids", namespace], capture_output=True, text=True
            ).stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            self.unplug(namespace)
        # Nodes mount this machine's Python into their homes, in mount namespaces that have ended with them.
        assert str(self.folder) not in Path("/proc/self/mountinfo").read_text()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _inside(self, *words: str) -> None:
        _ip("-n", self._hub, *words)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


def _but_itself(pattern: str) -> str:
    """The same pattern, which the command line of the shell that looks for it does not fit."""
    return f"[{pattern[0]}]{pattern[1:]}"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\"'\"'") + "'"
