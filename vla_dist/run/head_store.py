"""The two Redis servers of a cluster's head: one for replay and registry, one for what Ray must remember of itself.

Two, because what fills or flushes the one must not erase the other. A process of their own keeps them: it starts a
killed one again from its log, lives through a restart of Ray on the head, and ends when Ray has been gone for a while,
as after `ray down`. Data stay on the head's disk; what Ray remembers is then removed, so that the next `ray up` begins
anew.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from vla_dist.core.errors import ConfigError, NotFound, ResourceMissing, WaitTimeout
from vla_dist.replay.server import EmbeddedServer, half_of_memory
from vla_dist.run.files import write_atomically

STORE_FOLDER = Path(".vla-dist/store")
"""Below the home of whoever starts the head."""
_ADDRESSES, _WANTED, _LOG = "addresses.json", "wanted", "store.log"
_RAY, _REPLAY = "ray", "replay"
_LOOPBACK = "127.0.0.1"
_TICK_S = 1.0
_CONNECT_TIMEOUT_S = 2.0
_START_TIMEOUT_S = 60.0
HEAD_AWAY_S = 180.0
"""How long a cluster waits for Ray on its head to come back: nodes, replicas and the store go on meanwhile."""
_RAY_SHARE = 0.1
"""Of the memory that the servers may take: Ray stores its actors, jobs and nodes, some kilobytes each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadStoreConfig:
    """Where the servers of one head lie."""

    folder: Path
    """On a disk of the head that survives it."""
    host: str
    """Address of the head in the cluster's network, on which the replay's server listens."""
    replay_port: int = 6380
    ray_port: int = 6381
    """On loopback: only the head's own control service needs it."""
    gcs_port: int = 6379
    """Where Ray's control service listens, by which it is seen whether Ray runs."""
    grace_s: float = HEAD_AWAY_S
    """How long Ray may be gone before the servers end."""
    max_memory_gib: float = 0.0
    """Of both; 0: half of the machine's."""

    def __post_init__(self) -> None:
        if self.grace_s <= 0:
            raise ConfigError(f"grace_s {self.grace_s} must be positive, or a restart of Ray would lose its state")
        if len({self.replay_port, self.ray_port, self.gcs_port}) < 3:
            raise ConfigError(
                f"the ports {self.replay_port} (replay), {self.ray_port} (Ray's store) and {self.gcs_port} (Ray) must "
                "differ"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreAddresses:
    """URLs, passwords included."""

    pid: int
    """Of the process that keeps the servers."""
    replay_url: str
    """For every node."""
    ray_url: str
    """For the head."""

    @property
    def ray_address(self) -> str:
        return self.ray_url.rpartition("@")[2].partition("/")[0]

    @property
    def ray_password(self) -> str:
        return self.ray_url.partition("client:")[2].rpartition("@")[0]


def keep_store(config: HeadStoreConfig) -> None:
    """Run both servers until Ray has been gone for ``grace_s``, or until SIGTERM.

    Raises:
        ResourceMissing: a port is taken, or the folder is in use by another keeper.
    """
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    folder = config.folder
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    memory = int(config.max_memory_gib * 2**30) or half_of_memory()
    _touch(folder)

    def start(name: str, host: str, port: int, share: float) -> EmbeddedServer:
        return EmbeddedServer(folder / name, host=host, port=port, max_memory_bytes=int(share * memory))

    plans = {
        _REPLAY: (_REPLAY, config.host, config.replay_port, 1 - _RAY_SHARE),
        _RAY: (_RAY, _LOOPBACK, config.ray_port, _RAY_SHARE),
    }
    servers = {name: start(*plan) for name, plan in plans.items()}
    try:
        addresses = StoreAddresses(
            pid=os.getpid(), replay_url=str(servers[_REPLAY].tcp_url), ray_url=str(servers[_RAY].tcp_url)
        )
        _write_private(folder / _ADDRESSES, json.dumps(asdict(addresses)))
        while not stopped.wait(_TICK_S):
            for name, server in servers.items():
                if not server.alive:
                    print(f"{time.ctime()}: the server {name!r} died and is started again", flush=True)
                    servers[name] = start(*plans[name])
            if _answers(config.host, config.gcs_port):
                _touch(folder)
            elif time.time() - (folder / _WANTED).stat().st_mtime > config.grace_s:
                print(f"{time.ctime()}: Ray has been gone for {config.grace_s:.0f} s", flush=True)
                break
    finally:
        (folder / _ADDRESSES).unlink(missing_ok=True)
        for server in servers.values():
            server.close()
    if not stopped.is_set():
        shutil.rmtree(folder / _RAY, ignore_errors=True)


def ensure_store(config: HeadStoreConfig) -> StoreAddresses:
    """The addresses of servers that run, started in a process of their own where none do.

    Raises:
        ResourceMissing: they ended while starting; the message has the reason.
        WaitTimeout: they do not answer in time.
    """
    config.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _touch(config.folder)
    with contextlib.suppress(NotFound):
        return find_store(config.folder)
    words = [sys.executable, "-m", "vla_dist.cli", "cluster", "store", "--folder", str(config.folder)]
    for field in ("host", "replay_port", "ray_port", "gcs_port", "grace_s", "max_memory_gib"):
        words += [f"--{field.replace('_', '-')}", str(getattr(config, field))]
    log_path = config.folder / _LOG
    with open(log_path, "w") as log:
        keeper = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    end = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < end:
        with contextlib.suppress(NotFound):
            return find_store(config.folder)
        if keeper.poll() is not None:
            raise ResourceMissing(f"the head's store ended while it started: {log_path.read_text().strip()[-500:]}")
        time.sleep(0.1)
    raise WaitTimeout(f"the head's store did not answer within {_START_TIMEOUT_S:.0f} s; its log is {log_path}")


def find_store(folder: Path) -> StoreAddresses:
    """Those of the servers that run on ``folder``. Raises NotFound where none do."""
    try:
        addresses = StoreAddresses(**json.loads((folder / _ADDRESSES).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise NotFound(f"no store runs on {folder}; 'vla-dist cluster start-head' starts one") from error
    host, _, port = addresses.ray_address.partition(":")
    if not (_lives(addresses.pid) and _answers(host, int(port))):
        raise NotFound(f"the store on {folder} has ended; 'vla-dist cluster start-head' starts it again")
    return addresses


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S):
            return True
    except OSError:
        return False


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _touch(folder: Path) -> None:
    """Somebody wants the store now."""
    (folder / _WANTED).touch()


def _write_private(path: Path, text: str) -> None:
    old = os.umask(0o077)
    try:
        write_atomically(path, text)
    finally:
        os.umask(old)
