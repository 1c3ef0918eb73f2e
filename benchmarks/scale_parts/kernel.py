"""A discrete-event simulation of machines with cores, servers with queues and programs as generators.

A program yields what it waits for:

    yield sleep(0.1)                  # so many seconds
    yield work(host, 0.002)           # CPU seconds on a machine whose cores are shared by all that want them
    yield ask(server, 0.0001)         # served by a single thread, one after the other, on its machine
    yield until(signal)               # fired by somebody

Nothing in it knows this project.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

Resume = Callable[[], None]
Wait = Callable[["Simulation", Resume], None]
Program = Generator[Wait, None, None]


class Simulation:
    """The clock and what happens next."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Resume]] = []
        self._order = itertools.count()

    def at(self, moment: float, action: Resume) -> None:
        heapq.heappush(self._events, (moment, next(self._order), action))

    def start(self, program: Program) -> None:
        """Run a program from now on."""

        def resume() -> None:
            try:
                wait = next(program)
            except StopIteration:
                return
            wait(self, resume)

        self.at(self.now, resume)

    def run(self, until_s: float) -> None:
        while self._events and self._events[0][0] <= until_s:
            self.now, _, action = heapq.heappop(self._events)
            action()
        self.now = until_s


class Host:
    """``cores`` that all tasks share alike; no task gets more than one.

    Kept by virtual time: it passes at the rate at which each task is worked on, so that a task that begins at virtual
    time v with s seconds of work ends at v + s, however many others come and go.
    """

    def __init__(self, cores: float) -> None:
        self.cores = cores
        self.busy_s = 0.0
        """Core seconds worked so far."""
        self._virtual = self._looked_at = 0.0
        self._tasks: list[tuple[float, int, Resume]] = []
        self._order = itertools.count()
        self._plan = 0

    @property
    def _rate(self) -> float:
        return min(1.0, self.cores / len(self._tasks)) if self._tasks else 0.0

    def add(self, simulation: Simulation, seconds: float, resume: Resume) -> None:
        self._catch_up(simulation)
        heapq.heappush(self._tasks, (self._virtual + seconds, next(self._order), resume))
        self._schedule(simulation)

    def _catch_up(self, simulation: Simulation) -> None:
        passed = (simulation.now - self._looked_at) * self._rate
        self._virtual += passed
        self.busy_s += passed * len(self._tasks)
        self._looked_at = simulation.now

    def _schedule(self, simulation: Simulation) -> None:
        self._plan += 1
        if not self._tasks:
            return
        plan = self._plan
        left = max(0.0, self._tasks[0][0] - self._virtual) / self._rate

        def finish() -> None:
            if plan == self._plan:  # Nobody came or went meanwhile.
                self._finish(simulation)

        simulation.at(simulation.now + left, finish)

    def _finish(self, simulation: Simulation) -> None:
        # The virtual time may miss the task's end by a rounding error, and would then never reach it.
        end = self._tasks[0][0]
        self._catch_up(simulation)
        self._virtual = max(self._virtual, end)
        done = []
        while self._tasks and self._tasks[0][0] <= self._virtual:
            done.append(heapq.heappop(self._tasks)[2])
        self._schedule(simulation)
        for resume in done:
            resume()


@dataclass(slots=True)
class Server:
    """One thread that serves who asks, in order of arrival."""

    host: Host
    busy_s: float = 0.0
    """Seconds of service so far, as long as they would take alone."""
    _queue: deque[tuple[float, Resume]] = field(default_factory=deque)
    _serves: bool = False

    def add(self, simulation: Simulation, seconds: float, resume: Resume) -> None:
        self._queue.append((seconds, resume))
        if not self._serves:
            self._serve(simulation)

    def _serve(self, simulation: Simulation) -> None:
        self._serves = bool(self._queue)
        if not self._serves:
            return
        seconds, resume = self._queue.popleft()

        def finish() -> None:
            self.busy_s += seconds
            resume()
            self._serve(simulation)

        self.host.add(simulation, seconds, finish)


class Signal:
    """What somebody waits for; whoever waits when it is fired goes on."""

    def __init__(self) -> None:
        self._waiting: list[Resume] = []

    def fire(self, simulation: Simulation) -> None:
        waiting, self._waiting = self._waiting, []
        for resume in waiting:
            simulation.at(simulation.now, resume)

    def add(self, resume: Resume) -> None:
        self._waiting.append(resume)


def sleep(seconds: float) -> Wait:
    return lambda simulation, resume: simulation.at(simulation.now + seconds, resume)


def work(host: Host, seconds: float) -> Wait:
    return lambda simulation, resume: host.add(simulation, seconds, resume)


def ask(server: Server, seconds: float) -> Wait:
    return lambda simulation, resume: server.add(simulation, seconds, resume)


def until(signal: Signal) -> Wait:
    return lambda _, resume: signal.add(resume)


def gather(*waits: Wait) -> Wait:
    """Until all of them are over."""

    def wait(simulation: Simulation, resume: Resume) -> None:
        left = len(waits)

        def one() -> None:
            nonlocal left
            left -= 1
            if not left:
                resume()

        for each in waits:
            each(simulation, one)

    return wait


__all__: list[Any] = ["Host", "Program", "Server", "Signal", "Simulation", "ask", "gather", "sleep", "until", "work"]
