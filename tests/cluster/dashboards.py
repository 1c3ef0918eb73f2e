"""The dashboards and alerts of deploy/: which metrics they are made of, and their panels drawn from a Prometheus."""

import json
import os
import re
import shutil
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lab import CHECKOUT, Lab, Node

_NAME = re.compile(r"\bray_[a-zA-Z0-9_]+")
_VARIABLES = {"$run": ".*"}
"""Grafana's own, as its dashboards begin: all runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One of a dashboard."""

    dashboard: str
    title: str
    unit: str
    expressions: tuple[str, ...]
    legends: tuple[str, ...]


def panels() -> Iterator[Panel]:
    for path in sorted((CHECKOUT / "deploy" / "grafana").glob("*.json")):
        for one in json.loads(path.read_text())["panels"]:
            yield Panel(
                dashboard=path.stem,
                title=one["title"],
                unit=one["fieldConfig"]["defaults"].get("unit", ""),
                expressions=tuple(target["expr"] for target in one["targets"]),
                legends=tuple(target.get("legendFormat", "") for target in one["targets"]),
            )


def expressions() -> list[str]:
    """Of all panels and alerts."""
    found = [expression for panel in panels() for expression in panel.expressions]
    for group in yaml.safe_load((CHECKOUT / "deploy" / "prometheus" / "alerts.yml").read_text())["groups"]:
        found += [rule["expr"] for rule in group["rules"]]
    return found


def metrics() -> set[str]:
    return {name for expression in expressions() for name in _NAME.findall(expression)}


Series = list[tuple[str, list[float], list[float]]]
"""Legend, times in s since the first one of all, values."""


def ask_prometheus(
    get: Callable[[str], str], panel: Panel, *, start: float, end: float, step_s: float = 10.0
) -> Series:
    """The series that a panel shows.

    Args:
        get: answers a path of Prometheus' API.
        start, end: Unix times.
    """
    found: Series = []
    for expression, legend in zip(panel.expressions, panel.legends, strict=True):
        for name, value in _VARIABLES.items():
            expression = expression.replace(name, value)
        query = urllib.parse.urlencode({"query": expression, "start": start, "end": end, "step": step_s})
        answer = json.loads(get(f"/api/v1/query_range?{query}"))
        assert answer["status"] == "success", (panel.title, answer)
        for one in answer["data"]["result"]:
            times, values = zip(*((float(t) - start, float(v)) for t, v in one["values"]), strict=True)
            found.append((_legend(legend, one["metric"]), list(times), list(values)))
    return found


class Watch:
    """Prometheus on the head of a lab's cluster, with the configuration of deploy/, where this machine has one."""

    PORT = 9090

    def __init__(self, lab: Lab, head: Node) -> None:
        self._lab, self._head = lab, head
        self._began = time.time()
        self._program = shutil.which("prometheus")
        if self._program:
            head.ssh(
                f"cd ~/vla-dist && (nohup {self._program} --config.file deploy/prometheus/prometheus.yml "
                f"--storage.tsdb.path ~/prometheus --web.listen-address {head.address}:{self.PORT} "
                "> ~/prometheus.log 2>&1 &)"
            ).ok()

    def look(self) -> list[tuple[Panel, Series]]:
        """What every panel has shown so far; nothing without Prometheus. VLA_DIST_DASHBOARDS=FOLDER keeps pictures."""
        if not self._program:
            print("no prometheus on this machine (apt-get install prometheus): panels were not asked for", flush=True)
            return []
        end = time.time()
        shown = [(panel, ask_prometheus(self._get, panel, start=self._began, end=end)) for panel in panels()]
        if folder := os.environ.get("VLA_DIST_DASHBOARDS"):
            draw(shown, Path(folder))
        return shown

    def rules_in_trouble(self) -> list[Any]:
        """Alerts that Prometheus could not evaluate."""
        if not self._program:
            return []
        (group,) = json.loads(self._get("/api/v1/rules"))["data"]["groups"]
        return [rule for rule in group["rules"] if rule["health"] != "ok"]

    def _get(self, path: str) -> str:
        # It shares busy cores with everything that it watches.
        words = ["curl", "-sS", "--retry", "3", "--retry-all-errors", "-m", "60"]
        return self._lab.run([*words, f"http://{self._head.address}:{self.PORT}{path}"], timeout_s=300).ok().out


def _legend(template: str, labels: dict[str, str]) -> str:
    said = re.sub(r"{{\s*(\w+)\s*}}", lambda match: labels.get(match[1], ""), template)
    return said or ", ".join(f"{k}={v}" for k, v in labels.items() if k not in ("__name__", "job", "SessionName"))


def draw(shown: list[tuple[Panel, Series]], to: Path) -> None:
    """One picture a dashboard, laid out as Grafana would: three panels a row."""
    from matplotlib.figure import Figure

    names = sorted({panel.dashboard for panel, _ in shown})
    for name in names:
        mine = [(panel, series) for panel, series in shown if panel.dashboard == name]
        rows = -(-len(mine) // 3)
        figure = Figure(figsize=(15, 2.8 * rows), layout="constrained")
        axes: Any = figure.subplots(rows, 3, squeeze=False)
        for axis, (panel, series) in zip(axes.flat, mine, strict=False):
            axis.set_title(f"{panel.title} [{panel.unit}]", fontsize=9)
            for legend, times, values in series[:8]:
                axis.plot(times, values, label=legend[:40])
            axis.tick_params(labelsize=7)
            if series:
                axis.legend(fontsize=6, loc="best")
            else:
                axis.text(0.5, 0.5, "no data", ha="center", transform=axis.transAxes)
        for axis in list(axes.flat)[len(mine) :]:
            axis.set_axis_off()
        to.mkdir(parents=True, exist_ok=True)
        figure.savefig(to / f"{name}.png", dpi=80)
