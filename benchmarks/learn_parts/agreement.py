"""Whether two files of one benchmark agree: the same seeds in one process and through the whole system."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import t as student

_HEAD = """## In one process and through the whole system

The same seeds, so the same episodes, byte for byte (`tests/run/test_study.py`); what the whole system reached less what
one process reached. The interval over episodes (Newcombe) is of these very trainings, that over seeds (Student's t of
the seeds' differences) also of how much two trainings of one kind differ, which three seeds tell but roughly and one
does not tell. They agree where those that there are hold 0.

| benchmark | measure | difference | 95 % over episodes | 95 % over seeds | |
|---|---|---|---|---|---|"""


def comparable(results: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """(in one process, through the system) of one protocol and the same seeds."""
    alone = [result for result in results if "--in-process" in result["command"]]
    hosted = [result for result in results if "--in-process" not in result["command"]]
    return [
        (one, two)
        for one in alone
        for two in hosted
        if all(one[key] == two[key] for key in ("name", "protocol", "seeds"))
    ]


def differences(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """label -> ``mean``, ``low`` and ``high`` of the second's measure less the first's, and ``seeds_low`` and
    ``seeds_high`` of the seeds' differences, where there are two or more.

    The interval squares and adds the distances to the ends of the two intervals (Newcombe 1998, Statistics in
    Medicine 17, 873-890, method 10; Zou and Donner 2008 for any two). It speaks of episodes; that of the seeds, by
    Student's t, also of how much two trainings of one kind differ.
    """
    found = {}
    for label, first in one["measures"].items():
        second = two["measures"].get(label)
        if second is None:
            continue
        mean = second["mean"] - first["mean"]
        apart = [value - first["by_seed"][seed] for seed, value in second["by_seed"].items()]
        found[label] = {
            "mean": mean,
            "low": mean - math.hypot(second["mean"] - second["low"], first["high"] - first["mean"]),
            "high": mean + math.hypot(second["high"] - second["mean"], first["mean"] - first["low"]),
        }
        if len(apart) > 1:
            centre, half = (
                statistics.mean(apart),
                float(student.ppf(0.975, len(apart) - 1)) * statistics.stdev(apart) / math.sqrt(len(apart)),
            )
            found[label] |= {"seeds_low": centre - half, "seeds_high": centre + half}
    return found


def agreement(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; nothing where there is nothing to compare."""
    lines = []
    for one, two in comparable(results):
        for label, found in differences(one, two).items():
            episodes, seeds = (found["low"], found["high"]), (found.get("seeds_low"), found.get("seeds_high"))
            lines.append(
                f"| {one['title']} | {label} | {found['mean']:+.3f} | {_interval(*episodes)} | {_interval(*seeds)} | "
                f"{_verdict(_holds_zero(*episodes), seeds[0] is None or _holds_zero(*seeds))} |"
            )
    if not lines:
        return ""
    return "\n".join([_HEAD, *lines]) + "\n"


def _holds_zero(low: float | None, high: float | None) -> bool:
    return low is not None and high is not None and low <= 0.0 <= high


def _interval(low: float | None, high: float | None) -> str:
    return "-" if low is None else f"{low:+.3f} to {high:+.3f}"


def _verdict(over_episodes: bool, over_seeds: bool) -> str:
    if over_episodes and over_seeds:
        return "agree"
    return "agree over seeds, **differ** over episodes" if over_seeds else "**differ**"
