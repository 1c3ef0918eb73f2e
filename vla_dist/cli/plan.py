"""``vla-dist plan``: what a cluster file makes of a preset, before it is launched."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from vla_dist.run.cluster_file import read_cluster_file
from vla_dist.run.plan import COSTS, Plan, load_costs, make_plan
from vla_dist.run.presets import preset


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What goes where, how fast it will be, what it costs and what will be the bottleneck."""

    preset: tyro.conf.Positional[str]
    cluster: Path
    """A file of `ray up`, or a RayCluster."""
    costs: Path = COSTS
    """Measured rates of single parts, from 'vla-dist bench parts'."""
    robots: int = 0
    """Real robots that the policies are served to."""
    rollout_workers: int = 0
    """0: as many as the preset has."""
    learner_workers: int = 0
    replicas: int = 0
    gpu: bool = False
    """The learner on GPUs."""


def main(arguments: Sequence[str]) -> None:
    options = tyro.cli(PlanOptions, args=arguments, prog="vla-dist plan")
    config = preset(options.preset)
    learner, ranks = config.learner, options.learner_workers or config.learner.num_workers
    config = dataclasses.replace(
        config,
        rollout=dataclasses.replace(config.rollout, num_workers=options.rollout_workers or config.rollout.num_workers),
        learner=dataclasses.replace(learner, num_workers=ranks, use_gpu=options.gpu or learner.use_gpu),
        serving=dataclasses.replace(config.serving, num_replicas=options.replicas or config.serving.num_replicas),
    )
    costs = load_costs(options.preset, options.costs)
    show(make_plan(read_cluster_file(options.cluster), config, costs, num_robots=options.robots), Console())


def show(plan: Plan, console: Console) -> None:
    where = Table(title="what goes where")
    for heading in ("part", "how many", "node type", "nodes", "CPUs each", "GPUs each"):
        where.add_column(heading, justify="left" if heading in ("part", "node type") else "right")
    for one in plan.placed:
        late = " (when rollouts have ended)" if one.part.is_late else ""
        part = one.part
        where.add_row(
            part.name + late, str(part.count), one.group or "none", str(one.nodes), f"{part.cpus:g}", f"{part.gpus:g}"
        )
    console.print(where)
    stages = Table(title="what the pipeline asks of each part, the bottleneck first")
    for heading in ("part", "could", "is asked", "load"):
        stages.add_column(heading, justify="left" if heading == "part" else "right")
    for stage in plan.stages:
        stages.add_row(
            stage.name,
            f"{stage.most:,.0f} {stage.unit}",
            f"{stage.used:,.0f} {stage.unit}",
            f"{100 * stage.load:.0f} %",
        )
    console.print(stages)
    cost = (
        ""
        if plan.usd_per_hour is None
        else f", {plan.usd_per_hour:.2f} USD an hour, {plan.usd_per_hour * plan.hours:.2f} USD"
    )
    console.print(
        f"{plan.collect_steps_per_s:,.0f} steps/s collected, {plan.updates_per_s:,.1f} updates/s, {plan.hours:.2f} h "
        "of "
        f"training{cost}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"bottleneck: {plan.stages[0].name}; {plan.stages[0].remedy}", highlight=False, soft_wrap=True)
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"from: {plan.source}", highlight=False, markup=False, soft_wrap=True)
