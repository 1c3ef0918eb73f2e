"""``vla-dist evaluate``: success of a version of a run on unseen seeds."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

from vla_dist.evaluation.suite import InstructionMode, SuiteConfig, by_task, overall
from vla_dist.run.build import build_judge, build_registry
from vla_dist.run.reopen import reopen


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions:
    """Success of a version of a run on seeds that training cannot have."""

    run_dir: tyro.conf.Positional[Path]
    version: str = "stable"
    """A number, or a channel."""
    episodes_per_task: int = 20
    seed: int = 7
    """Of the suite; equal seeds give every version the same episodes."""
    instructions: Literal["training", "held_out"] = "training"
    """held_out: wordings that training never had."""
    mode: InstructionMode = "right"
    """zeroed or wrong: the language control, in the tasks that share a scene."""
    json: Path | None = None
    """Also write every episode there."""


def main(arguments: Sequence[str]) -> None:
    options = tyro.cli(EvaluateOptions, args=arguments, prog="vla-dist evaluate")
    with reopen(options.run_dir) as place:
        config = place.config
        version = build_registry(place).resolve(f"{config.preset}@{options.version}")
        tasks = config.env.tasks if options.mode == "right" else config.env.language_tasks
        suite = SuiteConfig(
            tasks=tasks, episodes_per_task=options.episodes_per_task, seed=options.seed, mode=options.mode
        )
        judge = build_judge(place, instructions=options.instructions)
        try:
            outcomes = judge.judge(version, suite)
        finally:
            judge.close()
    words = f"{options.instructions} words" if options.mode == "right" else f"{options.mode} words"
    table = Table(title=f"{config.preset} version {version}, {words}: success and 95 % Wilson interval")
    for heading in ("task", "success", "interval", "episodes"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for task, rate in [*by_task(outcomes).items(), ("all", overall(outcomes))]:
        table.add_row(task, f"{rate.mean:.2f}", f"{rate.low:.2f}-{rate.high:.2f}", str(rate.trials))
    Console().print(table)
    if options.json:
        rows = [asdict(outcome) for outcome in outcomes]
        options.json.write_text(json.dumps({"version": version, "suite": asdict(suite), "episodes": rows}, indent=2))
