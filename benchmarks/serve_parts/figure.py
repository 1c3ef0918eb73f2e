"""Throughput, latency and misses by number of robots, as one picture."""

from pathlib import Path

_LABELS = {"serve": "Ray Serve", "grpc_aio": "plain grpc.aio, same service", "fixed_window": "fixed window of 5 ms"}


def draw(answer: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curve, hz = answer["curve"], answer["paced"]["hz"]
    paced = {key: value for key, value in answer["paced"].items() if key != "hz"}
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    panels = (
        (axes[0], curve, "calls_per_s", "calls a second, flat out"),
        (axes[1], curve, "p99_ms", "p99 in ms, flat out"),
        (axes[2], paced, "miss_rate", f"share of calls later than a period, {hz:g} Hz"),
    )
    for axis, rows, key, title in panels:
        for system, label in _LABELS.items():
            points = [(int(robots), row[system][key]) for robots, row in rows.items() if system in row]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=label)
        axis.set_title(title)
        axis.set_xlabel("robots")
        axis.set_xscale("log", base=2)
        axis.set_xticks([int(robots) for robots in rows], labels=list(rows))
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
