"""What every peer is given: the same steps, the same windows, the same clock and the same command line.

Imported inside each peer's own virtual environment, so it needs NumPy and nothing of this project.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

T, K = 32, 20
EPISODE_STEPS = 4 * T
SLICES = 5
Arrays = dict[str, np.ndarray]
NAMES = ("low_dim", "image")
DEFAULT_WINDOWS = {"low_dim": 256, "image": 32}
DEFAULT_STORED_STEPS = {"low_dim": 65_536, "image": 2_560}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What to insert and to sample.

    Attributes:
        name: ``low_dim`` or ``image``, which adds an 84x84x3 frame of noise to each step.
        windows: Sequences of K steps in one sampled batch.
        stored_steps: Capacity of the peer's table, which is full while it is measured.
        seconds: Measured for each verb, in SLICES slices whose median counts.
        processes: Clients at the same time; their rates are added.
    """

    name: str
    windows: int
    stored_steps: int
    seconds: float
    processes: int

    def __post_init__(self) -> None:
        if self.windows < 1 or self.seconds <= 0 or self.processes < 1 or self.stored_steps < 2 * EPISODE_STEPS:
            raise ValueError(f"got {self}: expected positive numbers and stored_steps >= {2 * EPISODE_STEPS}")

    def episode(self) -> Arrays:
        """One episode of EPISODE_STEPS steps of noise, whose ``step`` counts from 0. Each column (128, ...)."""
        rng = np.random.default_rng(0)
        columns = {
            "observation": rng.standard_normal((EPISODE_STEPS, 39), np.float32),
            "action": rng.uniform(-1.0, 1.0, (EPISODE_STEPS, 4)).astype(np.float32),
            "reward": rng.standard_normal(EPISODE_STEPS, np.float32),
            "discount": np.full(EPISODE_STEPS, 0.99, np.float32),
            "step": np.arange(EPISODE_STEPS, dtype=np.int32),
        }
        if self.name == "image":
            columns["image"] = rng.integers(0, 256, (EPISODE_STEPS, 84, 84, 3), np.uint8)
        return columns

    def check(self, batch: Arrays, absent: Sequence[str] = ()) -> None:
        """Refuses a batch whose windows are not K consecutive steps of the episode, in every column.

        Raises:
            ValueError: A column is missing, misshapen, or not what was inserted.
        """
        steps = np.asarray(batch["step"]).reshape(-1, K).astype(np.int64)
        if len(steps) != self.windows or not (np.diff(steps, axis=1) == 1).all():
            raise ValueError(f"got step indices {steps[:2]} of {len(steps)} windows: expected {K} consecutive ones")
        for name, column in self.episode().items():
            if name not in absent and not np.array_equal(
                np.asarray(batch[name]).reshape(column[steps].shape), column[steps]
            ):
                raise ValueError(f"the sampled {name} is not what was inserted at its steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Steps a second of one client, one number a slice."""

    slices: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.slices)

    @property
    def best(self) -> float:
        """For choosing between clients on a noisy machine; what is reported is the median."""
        return max(self.slices)


def measure_insert(insert: Callable[[], int], finish: Callable[[], None], seconds: float) -> Rates:
    """Times ``insert``, which returns its steps; ``finish``, inside the time, sends what waits in the client."""
    insert()
    finish()
    rates = []
    for _ in range(SLICES):
        steps, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds / SLICES:
            steps += insert()
        finish()
        rates.append(steps / (time.perf_counter() - start))
    return Rates(slices=rates)


def measure_sample(
    sample: Callable[[], Arrays],
    check: Callable[[Arrays], None],
    seconds: float,
    before: Callable[[], object] | None = None,
) -> Rates:
    """Times ``sample``; ``check`` of each slice's last batch and ``before`` of every batch are not in the time."""
    for _ in range(3):
        check(sample())
    rates = []
    for _ in range(SLICES):
        steps, spent, batch = 0, 0.0, {}
        while spent < seconds / SLICES:
            if before is not None:
                before()
            start = time.perf_counter()
            batch = sample()
            spent += time.perf_counter() - start
            steps += batch["step"].size
        check(batch)
        rates.append(steps / spent)
    return Rates(slices=rates)


def best(trials: dict[str, float], what: str) -> str:
    """The name of the fastest trial; all of them go to stderr."""
    for name, rate in sorted(trials.items(), key=lambda item: -item[1]):
        print(f"{what}: {rate / 1000:9.1f} thousand steps/s  {name}", file=sys.stderr, flush=True)
    return max(trials, key=lambda name: trials[name])


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command line of a peer.

    Attributes:
        every_client: Try all known client settings first, not only those that won before.
        venvs: Folder of the peers' virtual environments.
    """

    workload: Workload
    every_client: bool
    venvs: Path


def parse(description: str | None) -> Options:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=NAMES, default="low_dim")
    parser.add_argument("--seconds", type=float, default=3.0, help="measured for each verb")
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2))
    parser.add_argument("--windows", type=int, help="of K = 20 steps in a batch; default 256, with images 32")
    parser.add_argument("--stored-steps", type=int, help="capacity; default 65536, with images 2560")
    parser.add_argument("--every-client", action="store_true", help="try all client settings, not only past winners")
    parser.add_argument("--venvs", type=Path, default=Path(__file__).resolve().parents[2] / ".venv-peers")
    given = parser.parse_args()
    try:
        workload = Workload(
            name=given.workload,
            windows=given.windows or DEFAULT_WINDOWS[given.workload],
            stored_steps=given.stored_steps or DEFAULT_STORED_STEPS[given.workload],
            seconds=given.seconds,
            processes=given.processes,
        )
    except ValueError as error:
        parser.error(str(error))
    return Options(workload=workload, every_client=given.every_client, venvs=given.venvs)


def report(
    system: str,
    version: str,
    workload: Workload,
    *,
    insert: float,
    sample: float,
    client: str,
    insert_by_unit: dict[int, float] | None = None,
) -> None:
    """Prints the answer, one JSON object on a line; ``insert_by_unit`` gives steps/s by the steps of one call."""
    answer = {
        "system": system,
        "version": version,
        "workload": workload.name,
        "insert_steps_per_s": round(insert),
        "sample_steps_per_s": round(sample),
        "client": client,
        "processes": workload.processes,
        "windows": workload.windows,
        "stored_steps": workload.stored_steps,
    }
    if insert_by_unit is not None:
        answer["insert_by_unit"] = {unit: round(rate) for unit, rate in insert_by_unit.items()}
    print(json.dumps(answer), flush=True)


def unavailable(reason: str) -> None:
    """Says why nothing was measured, and leaves with status 1."""
    print(reason, file=sys.stderr)
    print(json.dumps({"unavailable": reason}), flush=True)
    raise SystemExit(1)
