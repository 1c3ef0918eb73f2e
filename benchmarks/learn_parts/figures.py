"""Plots of answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WIDTH, HEIGHT, DPI = 7.5, 4.2, 110


def draw_bars(
    path: Path, groups: Mapping[str, Mapping[str, Mapping[str, Any]]], *, title: str, label: str = "success"
) -> None:
    """Bars with intervals, and a dot for each seed.

    Args:
        groups: group -> bar -> what ``results.measure`` gave; bars of one name have one colour.
    """
    figure, axes = plt.subplots(figsize=(WIDTH, HEIGHT), layout="constrained")
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        there = [(place, bars[name]) for place, bars in enumerate(groups.values()) if name in bars]
        places = [place + (index - (len(names) - 1) / 2) * width for place, _ in there]
        means = [found["mean"] for _, found in there]
        sides = [
            [found["mean"] - found["low"] for _, found in there],
            [found["high"] - found["mean"] for _, found in there],
        ]
        axes.bar(places, means, width * 0.9, yerr=sides, capsize=3, label=name)
        for place, (_, found) in zip(places, there, strict=True):
            seeds = list(found.get("by_seed", {}).values())
            axes.plot([place] * len(seeds), seeds, ".", color="black", ms=4, alpha=0.6)
    axes.set_xticks(range(len(groups)), list(groups), fontsize=9 if len(groups) < 5 else 8)
    axes.set(ylim=(-0.02, 1.05), ylabel=label, title=title)
    axes.grid(axis="y", alpha=0.3)
    # Five short names fit beside each other, three long ones.
    columns = 5 if sum(map(len, names)) < 80 else 3
    figure.legend(fontsize=8, loc="outside lower center", ncols=min(columns, len(names)))
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def draw_lines(
    path: Path,
    lines: Mapping[str, Sequence[tuple[float, Mapping[str, Any]]]],
    *,
    title: str,
    across: str,
    label: str = "success",
    is_log: bool = False,
    lowest: float = 0.0,
) -> None:
    """Lines with their intervals as bands.

    Args:
        lines: name -> (place on the axis, what ``results.measure`` gave).
        lowest: where the upright axis begins.
    """
    figure, axes = plt.subplots(figsize=(WIDTH, HEIGHT), layout="constrained")
    for name, points in lines.items():
        places = [place for place, _ in points]
        (line,) = axes.plot(places, [found["mean"] for _, found in points], marker="o", label=name)
        low, high = [found["low"] for _, found in points], [found["high"] for _, found in points]
        axes.fill_between(places, low, high, color=line.get_color(), alpha=0.15)
    if is_log:
        axes.set_xscale("log")
        ticks = _apart(sorted({place for points in lines.values() for place, _ in points}))
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    axes.set(ylim=(lowest - 0.02, 1.05 if lowest == 0 else 1.01), xlabel=across, ylabel=label, title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def _apart(ticks: Sequence[float]) -> list[float]:
    """Those whose labels do not touch on a logarithmic axis: the first, and each far enough from the one before."""
    kept = list(ticks[:1])
    for tick in ticks[1:]:
        if tick / kept[-1] >= (ticks[-1] / ticks[0]) ** 0.07:
            kept.append(tick)
    return kept
