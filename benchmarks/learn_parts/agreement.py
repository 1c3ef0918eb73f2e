"""Whether two files of one benchmark agree: the same seeds in one process and through the whole system."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

_HEAD = """## In one process and through the whole system

The same seeds, so the same episodes, byte for byte (`tests/run/test_study.py`); what the whole system reached less what
one process reached. They agree where the 95 % interval (Newcombe) holds 0; it speaks of episodes, not of how much two
trainings differ, and one row in twenty leaves it by chance.

| benchmark | measure | difference | 95 % interval | largest of a seed | |
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
    """label -> ``mean``, ``low`` and ``high`` of the second's measure less the first's, and ``largest``, the largest of
    a seed.

    The interval squares and adds the distances to the ends of the two intervals (Newcombe 1998, Statistics in
    Medicine 17, 873-890, method 10; Zou and Donner 2008 for any two). It speaks of episodes: how much two trainings
    of one kind differ is no part of it.
    """
    found = {}
    for label, first in one["measures"].items():
        second = two["measures"].get(label)
        if second is None:
            continue
        mean = second["mean"] - first["mean"]
        found[label] = {
            "mean": mean,
            "low": mean - math.hypot(second["mean"] - second["low"], first["high"] - first["mean"]),
            "high": mean + math.hypot(second["high"] - second["mean"], first["mean"] - first["low"]),
            "largest": max(
                (abs(value - first["by_seed"][seed]) for seed, value in second["by_seed"].items()), default=0.0
            ),
        }
    return found


def agreement(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; nothing where there is nothing to compare."""
    lines = []
    for one, two in comparable(results):
        for label, found in differences(one, two).items():
            verdict = "agree" if found["low"] <= 0.0 <= found["high"] else "**differ**"
            lines.append(
                f"| {one['title']} | {label} | {found['mean']:+.3f} | {found['low']:+.3f} to {found['high']:+.3f} | "
                f"{found['largest']:.3f} | {verdict} |"
            )
    if not lines:
        return ""
    return "\n".join([_HEAD, *lines]) + "\n"
