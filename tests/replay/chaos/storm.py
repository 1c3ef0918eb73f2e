"""Real processes around a real server, killed at random moments, and the count of what is there afterwards."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import redis
from chaos.audit import audit, check_balances
from chaos.stage import Stage

from vla_dist.replay.server import EmbeddedServer

_PROGRAMS = {
    "writer": "writer",
    "uniform": "sampler",
    "scored": "sampler",
    "consumer": "consumer",
    "archiver": "archiver",
}
"""By the first part of an actor's name."""
_PROGRESS_TIMEOUT_S = 60.0


@dataclass(slots=True)
class Totals:
    """Of one storm, or of several."""

    kills: Counter[str] = field(default_factory=Counter)
    stalls: int = 0
    acknowledged: int = 0
    """Episodes."""
    stored: int = 0
    archived: int = 0
    evicted: int = 0
    broken: int = 0
    """Evicted before they were whole."""
    duplicates: int = 0
    windows: int = 0
    taken: int = 0
    """Episodes acknowledged by consumers."""

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {num}" for kind, num in sorted(self.kills.items()))
        return (
            f"{self.kills.total()} kills ({kinds}), {self.stalls} stalls; episodes: {self.acknowledged} acknowledged, "
            f"{self.stored} stored, {self.evicted} evicted, {self.broken} of them open, {self.archived} archived, "
            f"{self.taken} taken from the queue; {self.windows} windows checked; {self.duplicates} duplicates refused"
        )


class Storm:
    """Usage: ``with Storm(...) as storm: storm.rage(40); totals = storm.settle()``."""

    def __init__(self, folder: Path, actors: Sequence[str], *, seed: int, capacity_steps: int = 1_000_000) -> None:
        """
        Args:
            folder: for the server, the journals and the archive.
            actors: names; the part before "-" says what an actor does, see ``_PROGRAMS``.
            seed: of who is killed when.
            capacity_steps: of the buffer.
        """
        self._folder = folder
        self._names = list(actors)
        self._rng = random.Random(seed)
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._before: dict[str, int] = {}
        self.totals = Totals()
        folder.mkdir(parents=True, exist_ok=True)
        self._server = EmbeddedServer(folder / "server")
        self.stage = Stage(url=self._server.url, capacity_steps=capacity_steps, seed=seed)
        self.stage.write(folder)
        self._table = self.stage.connect("uniform")

    def __enter__(self) -> "Storm":
        for name in self._names:
            self._start(name)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._running.values():
            process.kill()
            process.wait()
        self._table.close()
        self._server.close()

    def rage(self, kills: int, *, pause_s: float = 0.5) -> None:
        """Kill actors and the server, and stop the server for a while now and then, until there were ``kills``."""
        victims = [*self._names, "server", "server"]
        order: list[str] = []
        for number in range(kills):
            if not order:
                # Everybody once before anybody twice.
                order = self._rng.sample(victims, len(victims))
            victim = order.pop()
            # Kills must hit programs at work, not while they start.
            for name in self._names if victim == "server" else [victim]:
                self._await_progress(name)
            time.sleep(self._rng.uniform(0, pause_s))
            if victim == "server":
                self._kill_server()
            else:
                self._kill(victim)
            if self._rng.random() < 0.15:
                self._stall_server(self._rng.uniform(0.1, 2.0))
            check_balances(self._table.state())
            if (number + 1) % 10 == 0:
                print(f"  {number + 1} of {kills} kills: {dict(self.totals.kills)}", flush=True)

    def settle(self) -> Totals:
        """Let the writers finish and the queue run dry, then count everything."""
        for name in self._names:
            # A writer that starts takes up again what it had begun; told to stop before that, it would not.
            self._await_progress(name)
        (self._folder / "stop").touch()
        writers = [name for name in self._names if name.startswith("writer")]
        self._wait(lambda: all(self._running[name].poll() == 0 for name in writers), "the writers finish")
        self._wait(lambda: self._table.state().tables[2].limiter.drawable_steps == 0, "the queue runs dry")
        if any(name.startswith("archiver") for name in self._names):
            self._wait(lambda: self._table.state().archived == self._table.state().completions, "all is archived")
        for process in self._running.values():
            process.kill()
            process.wait()
        audit(self._folder, self._table, self.totals)
        return self.totals

    def _start(self, name: str) -> None:
        program = _PROGRAMS[name.split("-")[0]]
        path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
        with (self._folder / f"{name}.errors").open("ab") as errors:
            self._running[name] = subprocess.Popen(
                [sys.executable, "-m", f"chaos.{program}", str(self._folder), name],
                env={**os.environ, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
            )
        self._before[name] = self._progress(name)

    def _progress(self, name: str) -> int:
        path = self._folder / f"{name}.journal"
        return path.stat().st_size if path.exists() else 0

    def _await_progress(self, name: str) -> None:
        self._wait(lambda: self._progress(name) > self._before[name], f"{name} gets on")

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + 2 * _PROGRESS_TIMEOUT_S
        while not condition():
            for name, process in self._running.items():
                if process.poll():
                    errors = (self._folder / f"{name}.errors").read_text()
                    raise AssertionError(f"{name} ended by itself, with {process.returncode}:\n{errors[-3000:]}")
            if time.monotonic() > end:
                raise AssertionError(f"waited {2 * _PROGRESS_TIMEOUT_S} s until {what}; {self._table.state()}")
            time.sleep(0.01)

    def _kill(self, name: str) -> None:
        process = self._running[name]
        process.send_signal(signal.SIGKILL)
        process.wait()
        self.totals.kills[name.split("-")[0]] += 1
        self._start(name)

    def _kill_server(self) -> None:
        if self._rng.random() < 0.3:
            self._begin_rewrite()
        os.kill(self._server.pid, signal.SIGKILL)
        while self._server.alive:
            time.sleep(0.001)
        self.totals.kills["server"] += 1
        time.sleep(self._rng.choice([0.0, 0.0, 1.0]) * self._rng.random())
        self._server = EmbeddedServer(self._folder / "server")
        for name in self._names:
            # Who waited for the server must get on with it.
            self._before[name] = self._progress(name)

    def _begin_rewrite(self) -> None:
        """Of the append-only file, so that the kill may hit it in the middle."""
        socket_path = str(self._server.directory / "server.sock")
        with redis.Redis(
            unix_socket_path=socket_path, username="admin", password=self._server._admin_password
        ) as admin:
            admin.bgrewriteaof()

    def _stall_server(self, seconds: float) -> None:
        os.kill(self._server.pid, signal.SIGSTOP)
        try:
            time.sleep(seconds)
        finally:
            os.kill(self._server.pid, signal.SIGCONT)
        self.totals.stalls += 1
