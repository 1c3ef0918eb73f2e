"""A run in a child process, as a person starts it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest


class ChildRun:
    """``vla-dist run``, or another verb, in a folder of its own, with everything it prints in a log there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process: subprocess.Popen[str] | None = None

    def start(self, *words: str, verb: str = "run") -> None:
        arguments = [sys.executable, "-m", "vla_dist.cli", verb, *words]
        with open(self.folder / "log.txt", "a") as log:
            self._process = subprocess.Popen(
                arguments, stdout=log, stderr=log, text=True, cwd=self.folder, start_new_session=True
            )

    @property
    def process(self) -> subprocess.Popen[str]:
        assert self._process is not None
        return self._process

    @property
    def log(self) -> str:
        return (self.folder / "log.txt").read_text()

    def finish(self, *, timeout_s: float) -> dict:
        """The summary of a run that ended well."""
        code = self.process.wait(timeout=timeout_s)
        assert code == 0, self.log[-3000:]
        (summary,) = self.folder.glob("runs/*/summary.json")
        return json.loads(summary.read_text())

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def named(self, prefix: str, *, but: str | None = None) -> list[psutil.Process]:
        found = []
        for process in self.descendants():
            try:
                title = " ".join(process.cmdline())
                found += [process] if title.startswith(prefix) and not (but and title.startswith(but)) else []
            except psutil.Error:
                continue
        return found

    def serving(self, folder: Path) -> list[psutil.Process]:
        """Embedded servers whose files lie below a folder."""
        found = []
        for process in self.descendants():
            try:
                is_below = Path(process.cwd()).is_relative_to(folder)
                found += [process] if is_below and process.name().startswith(("valkey", "redis")) else []
            except psutil.Error:
                continue
        return found

    def wait_for(self, find, *, what: str, timeout_s: float = 150.0):
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if found := find():
                return found
            assert self.process.poll() is None, f"the run ended before the {what}: {self.log[-2000:]}"
            time.sleep(0.2)
        raise AssertionError(f"no {what} within {timeout_s} s: {self.log[-2000:]}")

    def stop(self) -> None:
        """Ctrl-C, if it still runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self._process.kill()


@pytest.fixture
def child(tmp_path):
    run = ChildRun(tmp_path)
    yield run
    run.stop()
