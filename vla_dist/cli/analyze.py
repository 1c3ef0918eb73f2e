"""``vla-dist analyze``: what a policy costs, and whether it keeps up with a robot."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path

import torch
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from vla_dist.core.errors import ConfigError
from vla_dist.models.analysis.costs import Costs, measure_costs
from vla_dist.models.analysis.figure import draw_costs
from vla_dist.models.analysis.subjects import Subject, subject
from vla_dist.models.analysis.verdict import Verdict, judge
from vla_dist.models.zoo import ARCHITECTURES, architecture
from vla_dist.run.composition.learning import build_model_config
from vla_dist.run.composition.place import build_spec
from vla_dist.run.presets import PRESETS, preset


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalyzeOptions:
    """What policies cost on this machine's CPU, and whether they keep up with a robot."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Of members and sizes (rt1/small), members in every size (rt1), or runs (demo); each member's first size where
    left out."""
    control_hz: float | None = None
    """Rate of the robot; that of its spec where left out."""
    network_ms: float = 0.0
    """Round trip between robot and policy."""
    threads: int = 1
    """Of the CPU."""
    budget_s: float = 10.0
    """Time for the latency of each, and as much for its throughput."""
    json: bool = False
    """Print JSON instead of tables."""
    picture: Path | None = None
    """Draw the comparison into this PNG."""


def main(arguments: Sequence[str]) -> None:
    options = tyro.cli(AnalyzeOptions, args=arguments, prog="vla-dist analyze")
    if options.threads < 1 or options.budget_s <= 0:
        raise ConfigError(f"--threads {options.threads} must be at least 1 and --budget-s {options.budget_s} positive")
    torch.set_num_threads(options.threads)
    names = options.names or tuple(f"{member.name}/{next(iter(member.presets))}" for member in ARCHITECTURES.values())
    subjects = [one for name in names for one in _subjects(name)]
    console, found = Console(stderr=options.json), []
    for one in subjects:
        with console.status(f"measuring {one.name}"):
            costs = measure_costs(one, clock=time.perf_counter, budget_s=options.budget_s)
        found.append((costs, _verdict(costs, one, options)))
    if options.picture is not None:
        draw_costs([costs for costs, _ in found], options.picture, verdict=found[0][1])
    if options.json:
        print(json.dumps([asdict(costs) | {"verdict": asdict(verdict)} for costs, verdict in found], indent=2))
        return
    console.print(_sizes(found))
    console.print(_times(found, options.threads))
    for costs, verdict in found:
        parts = ", ".join(f"{part} {count:,}" for part, count in costs.parameters_by_module.items())
        console.print(f"[bold]{costs.name}[/bold] {verdict.sentence}", highlight=False)
        console.print(f"  parameters: {parts}", highlight=False)
    if options.picture is not None:
        console.print(f"picture: {options.picture}", highlight=False, soft_wrap=True)


def _subjects(name: str) -> list[Subject]:
    """What a word of the command line stands for."""
    member, slash, size = name.partition("/")
    if slash:
        return [subject(architecture(member), size)]
    if name in ARCHITECTURES:
        return [subject(ARCHITECTURES[name], size) for size in ARCHITECTURES[name].presets]
    if name in PRESETS:
        run = preset(name)
        spec = build_spec(run)
        config = build_model_config(run, spec)
        return [Subject(member=architecture(run.model.architecture), preset=f"{name} run", spec=spec, config=config)]
    owners = [one for one in ARCHITECTURES.values() if name in one.presets]
    if len(owners) == 1:
        return [subject(owners[0], name)]
    known = [
        *ARCHITECTURES,
        *PRESETS,
        *(f"{one.name}/{size}" for one in ARCHITECTURES.values() for size in one.presets),
    ]
    near = [f"{one.name}/{name}" for one in owners] or get_close_matches(name, known, n=3)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    raise ConfigError(
        f"{name!r} is no member, run or single size; {hint}"
        f"Members: {', '.join(ARCHITECTURES)}; runs: {', '.join(PRESETS)}; sizes: member/size"
    )


def _verdict(costs: Costs, one: Subject, options: AnalyzeOptions) -> Verdict:
    return judge(
        p99_ms=costs.latency_ms["p99"],
        horizon=costs.horizon,
        control_hz=options.control_hz if options.control_hz is not None else one.spec.control_hz,
        network_ms=options.network_ms,
    )


def _sizes(found: Sequence[tuple[Costs, Verdict]]) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        title="size and arithmetic",
        caption="activations: of one training window; state: of one robot; FLOPs by torch's counter, formula: how far "
        "the closed form is from it; train: forward and backward of one window",
    )
    table.add_column("model", overflow="fold", min_width=12)
    for heading in ("params", "weights", "activations", "state", "FLOPs/act", "formula", "train"):
        table.add_column(heading, justify="right", no_wrap=True)
    for costs, _ in found:
        table.add_row(
            costs.name,
            _scaled(costs.num_parameters),
            _scaled(costs.weight_bytes, "B"),
            _scaled(costs.activation_bytes, "B"),
            _scaled(costs.state_bytes, "B"),
            _scaled(costs.act_flops),
            f"{costs.act_flops_closed_form / max(1, costs.act_flops) - 1:+.2%}",
            _scaled(costs.training_flops),
        )
    return table


def _times(found: Sequence[tuple[Costs, Verdict]], threads: int) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        title=f"time on {threads} CPU thread{'s' if threads > 1 else ''}",
        caption="p50, p95, p99: ms of one act; xB: acts a second in batches of B",
    )
    table.add_column("model", overflow="fold", min_width=12)
    for heading in ("p50", "p95", "p99", *(f"x{batch}" for batch in found[0][0].acts_per_s)):
        table.add_column(heading, justify="right", no_wrap=True)
    for costs, _ in found:
        times = [f"{costs.latency_ms[name]:.2f}" for name in ("p50", "p95", "p99")]
        table.add_row(costs.name, *times, *(_scaled(rate).replace(" ", "") for rate in costs.acts_per_s.values()))
    return table


def _scaled(value: float, unit: str = "") -> str:
    for prefix, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip()
