"""Architectures side by side as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vla_dist.models.analysis.costs import Costs
from vla_dist.models.analysis.verdict import Verdict

_BLUE, _ORANGE, _GREY = "#1f6f8b", "#e07a3f", "#9aa5ad"


def draw_costs(costs: Sequence[Costs], path: Path, *, verdict: Verdict | None = None) -> None:
    """Parameters, memory, operations, latency and throughput of each, on logarithmic axes, to a PNG.

    Args:
        verdict: of any of them; its control rate is drawn as the time that a synchronous answer may take.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import EngFormatter

    names = [one.name for one in costs]
    places = list(range(len(costs)))
    height = max(3.2, 1.4 + 0.42 * len(costs))
    figure, axes = plt.subplots(2, 2, figsize=(13, 2 * height), constrained_layout=True)
    _bars(axes[0, 0], names, [one.num_parameters for one in costs], "parameters", _BLUE)
    kinds = [
        ("weights", _BLUE, [one.weight_bytes for one in costs]),
        ("activations of one training window", _ORANGE, [one.activation_bytes for one in costs]),
        ("state of one robot", _GREY, [one.state_bytes for one in costs]),
    ]
    for shift, (label, colour, values) in zip((0.27, 0.0, -0.27), kinds, strict=True):
        axes[0, 1].barh([place - shift for place in places], values, height=0.25, color=colour, label=label)
    axes[0, 1].set(title="memory", xlabel="bytes", xscale="log")
    axes[0, 1].legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=3, frameon=False)
    axes[0, 1].xaxis.set_major_formatter(EngFormatter("B"))
    for place, one in zip(places, costs, strict=True):
        p50, p99 = one.latency_ms["p50"], one.latency_ms["p99"]
        axes[1, 0].plot([p50, p99], [place, place], color=_GREY, linewidth=3, zorder=1)
        axes[1, 0].scatter(p50, place, color=_BLUE, zorder=2, label="p50" if not place else None)
        axes[1, 0].scatter(p99, place, color=_ORANGE, zorder=2, label="p99" if not place else None)
    if verdict is not None:
        left = 1000 / verdict.control_hz - verdict.network_ms
        if left > 0:
            axes[1, 0].axvline(left, color="black", linestyle="--", linewidth=1)
            axes[1, 0].annotate(
                f"{verdict.control_hz:g} Hz less {verdict.network_ms:g} ms network ",
                (left, 0.02),
                xycoords=("data", "axes fraction"),
                ha="right",
                fontsize=8,
            )
    axes[1, 0].set(title="latency of one act", xlabel="ms", xscale="log")
    axes[1, 0].xaxis.set_major_formatter("{x:g}")
    axes[1, 0].legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2, frameon=False)
    for one in costs:
        axes[1, 1].plot(list(one.acts_per_s), list(one.acts_per_s.values()), "o-", markersize=4, label=one.name)
    axes[1, 1].set(title="throughput", xlabel="batch", ylabel="acts/s", xscale="log", yscale="log")
    batches = sorted({batch for one in costs for batch in one.acts_per_s})
    axes[1, 1].set_xticks(batches, [str(batch) for batch in batches])
    axes[1, 1].minorticks_off()
    axes[1, 1].yaxis.set_major_formatter(EngFormatter())
    axes[1, 1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    for axis in (axes[0, 1], axes[1, 0]):
        axis.set_yticks(places, names)
        axis.set_ylim(len(costs) - 0.4, -0.6)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(axis: Any, names: list[str], values: list[int], title: str, colour: str) -> None:
    from matplotlib.ticker import EngFormatter

    axis.barh(range(len(names)), values, color=colour, height=0.6)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set(title=title, xscale="log", xlim=(min(values) / 3, max(values) * 6))
    axis.xaxis.set_major_formatter(EngFormatter())
    for place, value in enumerate(values):
        axis.annotate(
            EngFormatter(places=1)(value),
            (value, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
