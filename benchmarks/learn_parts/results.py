"""What a learning benchmark answers: plain JSON from which the results page is made."""

import datetime
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from learn.settings import Settings

from vla_dist.evaluation.statistics import paired_difference, success_rate
from vla_dist.evaluation.suite import EpisodeOutcome
from vla_dist.run.composition.place import git_revision

Counts = tuple[int, int]
"""Successes and trials."""


def count(outcomes: Sequence[EpisodeOutcome]) -> Counts:
    return sum(outcome.success for outcome in outcomes), len(outcomes)


def measure(by_seed: Mapping[int, Sequence[int]]) -> dict[str, Any]:
    """Successes out of trials of each seed, and of all episodes with their Wilson interval.

    The interval is of these trained policies on further episodes; how much trainings differ is what the seeds show.
    """
    rate = success_rate(sum(s for s, _ in by_seed.values()), sum(t for _, t in by_seed.values()))
    return {
        "mean": rate.mean,
        "low": rate.low,
        "high": rate.high,
        "episodes": rate.trials,
        "by_seed": {str(seed): successes / trials for seed, (successes, trials) in by_seed.items()},
    }


def difference(first: Sequence[EpisodeOutcome], second: Sequence[EpisodeOutcome]) -> list[list[bool]]:
    """Successes of two on the same episodes, in one order, to be kept for ``paired``."""

    def key(outcome: EpisodeOutcome) -> tuple[str, int]:
        return outcome.task, outcome.seed

    pairs = zip(sorted(first, key=key), sorted(second, key=key), strict=True)
    return [[bool(one.success), bool(two.success)] for one, two in pairs]


def paired(by_seed: Mapping[int, Sequence[Sequence[bool]]]) -> dict[str, Any]:
    """How much more often the second succeeded, over all seeds."""
    pairs = [pair for rows in by_seed.values() for pair in rows]
    found = paired_difference([one for one, _ in pairs], [two for _, two in pairs])
    return {
        "mean": found.mean,
        "low": found.low,
        "high": found.high,
        "episodes": found.trials,
        "p_value": found.p_value,
        "by_seed": {
            str(seed): sum(int(two) - int(one) for one, two in rows) / len(rows) for seed, rows in by_seed.items()
        },
    }


def target(what: str, value: float, wanted: float, *, at_most: bool = False, source: str = "") -> dict[str, Any]:
    """A figure beside the one that was wanted; missed is missed."""
    met = value <= wanted if at_most else value >= wanted
    bound = "at most" if at_most else "at least"
    return {"what": what, "value": value, "wanted": wanted, "bound": bound, "met": bool(met), "source": source}


def answer(
    settings: Settings,
    *,
    name: str,
    title: str,
    question: str,
    protocol: Mapping[str, Any],
    seeds: Mapping[int, Mapping[str, Any]],
    measures: Mapping[str, Mapping[str, Any]],
    targets: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything the page shows.

    Args:
        seeds: what ``run_seeds`` gave; its ``wall_s`` are shown.
        measures: label -> what ``measure`` or ``paired`` gave; or any mapping with mean, low, high and by_seed.
        notes: sentences below the table.
    """
    return {
        "name": name,
        "title": title,
        "question": question,
        "claims": not settings.quick,
        "path": "in one process" if settings.in_process else "rollout workers, Redis, Ray Train, judges",
        "protocol": dict(protocol),
        "seeds": list(seeds),
        "wall_s": {str(seed): found["wall_s"] for seed, found in seeds.items()},
        "measures": {label: dict(found) for label, found in measures.items()},
        "targets": [] if settings.quick else [dict(one) for one in targets],
        "notes": list(notes),
        **origin(),
        "command": _command(name, settings),
        "rows": {str(seed): dict(found) for seed, found in seeds.items()},
    }


def origin() -> dict[str, str]:
    """Where, when and of which code a figure is."""
    return {"machine": machine(), "date": datetime.date.today().isoformat(), "git_revision": git_revision()}


def machine() -> str:
    """Processor and cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor() or platform.machine()}"


def _command(name: str, settings: Settings) -> str:
    """What repeats it, wherever its files were put."""
    words = ["vla-dist bench learn", name, f"--seeds {len(settings.seeds)}"]
    words += [f"--first-seed {settings.seeds[0]}"] if settings.seeds[0] else []
    words += ["--quick"] if settings.quick else []
    words += ["--in-process"] if settings.in_process else []
    return " ".join(words)
