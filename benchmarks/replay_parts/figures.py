"""The benchmark's answer as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def draw(answer: Mapping[str, Any], path: Path) -> None:
    """Rates by system, over stored steps and over value size. Parts that were not run are left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(12, 9.5), constrained_layout=True)
    for axis, name, title in zip(
        axes[0], ("low_dim", "image"), ("39 + 4 floats a step", "the same and an 84x84x3 frame"), strict=True
    ):
        _bars(axis, answer.get(name), f"{title}: T = 32, K = 20")
    _over_capacity(axes[1, 0], answer)
    _over_value_size(axes[1, 1], answer.get("value_size"))
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(axis: Any, found: Mapping[str, Any] | None, title: str) -> None:
    from matplotlib.ticker import EngFormatter

    axis.set_title(title)
    if not found:
        return
    systems = list(found["sample_steps_per_s"])
    places = range(len(systems))
    for shift, action, colour in ((-0.2, "insert", "#e07a3f"), (0.2, "sample", "#1f6f8b")):
        rates = [found[f"{action}_steps_per_s"].get(system, 0.0) for system in systems]
        axis.barh([place + shift for place in places], rates, height=0.38, color=colour, label=action)
        for place, rate in zip(places, rates, strict=True):
            axis.annotate(
                f"{rate / 1000:.0f} k",
                (rate, place + shift),
                va="center",
                fontsize=7,
                xytext=(3, 0),
                textcoords="offset points",
            )
    axis.set_yticks(list(places), systems, fontsize=8)
    axis.invert_yaxis()
    left, right = axis.get_xlim()
    axis.set(xscale="log", xlabel="steps/s", xlim=(max(left, 3000), 3 * right))
    axis.xaxis.set_major_formatter(EngFormatter())
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, -0.26), ncols=2, frameon=False)


def _over_capacity(axis: Any, answer: Mapping[str, Any]) -> None:
    axis.set_title("over capacity (low-dim)")
    for key, label, colour in (
        ("capacity", "readers keep all rows", "#1f6f8b"),
        ("capacity_without_cache", "readers keep none", "#e07a3f"),
    ):
        if stored := answer.get(key):
            axis.plot([int(steps) for steps in stored], list(stored.values()), "o-", color=colour, label=label)
            axis.set(xscale="log", xlabel="stored steps", ylabel="sampled steps/s")
            axis.set_ylim(0, 1.1 * max(axis.get_ylim()[1], *stored.values()))
            _in_thousands(axis)
            axis.legend(frameon=False)


def _over_value_size(axis: Any, sizes: Mapping[str, float] | None) -> None:
    axis.set_title("over value size")
    if not sizes:
        return
    bytes_a_step = [_step_bytes(name) for name in sizes]
    axis.plot(bytes_a_step, list(sizes.values()), "o", color="#1f6f8b")
    for size, (name, rate) in zip(bytes_a_step, sizes.items(), strict=True):
        axis.annotate(name, (size, rate), textcoords="offset points", xytext=(6, 4), fontsize=8)
    axis.margins(0.15)
    axis.set(xscale="log", yscale="log", xlabel="bytes a step", ylabel="sampled steps/s")
    _in_thousands(axis)


def _in_thousands(axis: Any) -> None:
    from matplotlib.ticker import EngFormatter

    axis.xaxis.set_major_formatter(EngFormatter())
    axis.yaxis.set_major_formatter(EngFormatter())


def _step_bytes(name: str) -> int:
    if name.endswith(" floats"):
        return 4 * int(name.split()[0])
    height, width, channels = (int(part) for part in name.split("x"))
    return height * width * channels
