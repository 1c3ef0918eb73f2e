"""Small real runs beside their simulation, and the simulation as far as it goes, as one picture."""

from pathlib import Path
from typing import Any


def draw(answer: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7), constrained_layout=True)
    _checks(axes[0, 0], answer["pipeline"], "updates_per_s", "updates a second, one machine")
    _checks(axes[0, 1], answer["pipeline"], "steps_per_s", "steps a second, one machine")
    serving = axes[0, 2]
    for key, style in (("measured", "o-"), ("simulated", "x--")):
        rows = answer["serving"]
        serving.plot([row["robots"] for row in rows], [row[key]["p99_ms"] for row in rows], style, label=f"p99, {key}")
        serving.plot([row["robots"] for row in rows], [row[key]["p50_ms"] for row in rows], style, label=f"p50, {key}")
    serving.set(title="latency in ms, one machine", xlabel="robots", xscale="log", yscale="log")
    serving.legend(fontsize=7)
    curves = answer["curves"]
    _curve(axes[1, 0], curves["robots"], "robots", "calls_per_s", "calls a second, one replica")
    _curve(axes[1, 1], curves["rollouts"], "rollouts", "steps_per_s", "steps a second, one replay server")
    _curve(axes[1, 2], curves["ranks"], "ranks", "updates_per_s", "updates x ranks a second, one replay server")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _checks(axis: Any, rows: list[dict[str, Any]], key: str, title: str) -> None:
    labels = [f"{row['rollouts']} + {row['ranks']}" for row in rows]
    places = range(len(rows))
    axis.bar([p - 0.2 for p in places], [row["measured"][key] for row in rows], 0.4, label="measured")
    axis.bar([p + 0.2 for p in places], [row["simulated"][key] for row in rows], 0.4, label="simulated")
    axis.set_xticks(list(places), labels=labels)
    axis.set(title=title, xlabel="rollout actors + learner ranks")
    axis.legend(fontsize=7)


def _curve(axis: Any, rows: list[dict[str, Any]], name: str, key: str, title: str) -> None:
    counts = [row[name] for row in rows]
    factor = counts if name == "ranks" else [1] * len(rows)
    axis.plot(counts, [row[key] * times for row, times in zip(rows, factor, strict=True)], "x-", label="simulated")
    ideal = [row["most"] for row in rows]
    axis.plot(counts, ideal, ":", label="if nothing else held it back" if name == "ranks" else "most of that part")
    axis.set(title=title, xlabel=name, xscale="log", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
