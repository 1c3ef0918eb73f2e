"""``vla-dist evaluate``: success of a version of a run on unseen seeds, or of two versions on the same ones."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from vla_dist.core.errors import ConfigError
from vla_dist.evaluation.pairing import PairedComparison, compare_outcomes
from vla_dist.evaluation.suite import EpisodeOutcome, InstructionMode, SuiteConfig, by_task, overall
from vla_dist.run.composition.rollouts import build_judge
from vla_dist.run.composition.stores import build_registry
from vla_dist.run.config import RunConfig
from vla_dist.run.reopen import reopen


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions:
    """Success of a version of a run on seeds that training cannot have, or of two versions on the same ones."""

    run_dir: tyro.conf.Positional[Path]
    """FOLDER, or FOLDER@VERSION with a number or a channel."""
    other: tyro.conf.Positional[str] = ""
    """A second one, or @VERSION of the same folder: both are given the same episodes, and how much better this one is
    comes with an interval."""
    version: str = "stable"
    """Where the folder names none: a number, or a channel."""
    episodes_per_task: int = 20
    seed: int = 7
    """Of the suite; equal seeds give every version the same episodes."""
    instructions: Literal["training", "held_out"] = "training"
    """held_out: wordings that training never had."""
    mode: InstructionMode = "right"
    """zeroed or wrong: the language control, in the tasks that share a scene."""
    json: Path | None = None
    """Also write every episode there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judged:
    label: str
    version: int
    config: RunConfig
    suite: SuiteConfig
    outcomes: list[EpisodeOutcome]

    def to_json(self) -> dict[str, Any]:
        rows = [asdict(outcome) for outcome in self.outcomes]
        return {"run": self.label, "version": self.version, "suite": asdict(self.suite), "episodes": rows}


def main(arguments: Sequence[str]) -> None:
    options = tyro.cli(EvaluateOptions, args=arguments, prog="vla-dist evaluate")
    folder, version = _split(str(options.run_dir), default=options.version)
    console = Console()
    words = f"{options.instructions} words" if options.mode == "right" else f"{options.mode} words"
    if not options.other:
        judged = _judge(folder, version, options)
        _print(console, judged, words)
        answer = judged.to_json()
    else:
        other_folder, other_version = _split(options.other, default=options.version)
        first = _judge(folder, version, options)
        second = _judge(other_folder if str(other_folder) not in ("", ".") else folder, other_version, options, first)
        comparison = compare_outcomes(first.outcomes, second.outcomes)
        _print_pair(console, first, second, comparison, words)
        answer = {
            "first": first.to_json(),
            "second": second.to_json(),
            "difference": {"mean": comparison.overall.mean, **asdict(comparison.overall)},
            "difference_by_task": {task: {"mean": d.mean, **asdict(d)} for task, d in comparison.by_task.items()},
        }
    if options.json:
        options.json.write_text(json.dumps(answer, indent=2) + "\n")


def _split(text: str, *, default: str) -> tuple[Path, str]:
    """``FOLDER@VERSION``; a folder that has an @ in its name is taken whole."""
    if Path(text).exists() or "@" not in text:
        return Path(text), default
    folder, _, version = text.rpartition("@")
    return Path(folder), version or default


def _judge(folder: Path, version: str, options: EvaluateOptions, like: _Judged | None = None) -> _Judged:
    """Args:
    like: the other one of a pair, whose episodes this one must be able to have.
    """
    with reopen(folder) as place:
        config = place.config
        number = build_registry(place).resolve(f"{config.preset}@{version}")
        if like is not None:
            _require_same_episodes(like, config, folder)
        tasks = config.env.tasks if options.mode == "right" else config.env.language_tasks
        suite = SuiteConfig(
            tasks=tasks, episodes_per_task=options.episodes_per_task, seed=options.seed, mode=options.mode
        )
        judge = build_judge(place, instructions=options.instructions)
        try:
            outcomes = judge.judge(number, suite)
        finally:
            judge.close()
    label = f"{folder.resolve().name}@{number}"
    return _Judged(label=label, version=number, config=config, suite=suite, outcomes=outcomes)


def _require_same_episodes(first: _Judged, config: RunConfig, folder: Path) -> None:
    """Raises ConfigError with what differs."""
    names = ("family", "tasks", "language_tasks", "max_episode_steps", "layouts")
    one, two = first.config.env, config.env
    differing = [
        f"env.{name} {getattr(one, name)} against {getattr(two, name)}"
        for name in names
        if getattr(one, name) != getattr(two, name)
    ]
    if differing:
        raise ConfigError(
            f"{first.label} and {folder.name} cannot be given the same episodes: {'; '.join(differing)}. Compare "
            "versions of runs with one environment"
        )


def _print(console: Console, judged: _Judged, words: str) -> None:
    table = Table(title=f"{judged.config.preset} version {judged.version}, {words}: success and 95 % Wilson interval")
    for heading in ("task", "success", "interval", "episodes"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for task, rate in [*by_task(judged.outcomes).items(), ("all", overall(judged.outcomes))]:
        table.add_row(task, f"{rate.mean:.2f}", f"{rate.low:.2f}-{rate.high:.2f}", str(rate.trials))
    console.print(table)


def _print_pair(console: Console, first: _Judged, second: _Judged, comparison: PairedComparison, words: str) -> None:
    table = Table(title=f"A {first.label}, B {second.label}, {words}: success on the same episodes")
    headings = ("task", "A", "B", "B - A", "95 % interval", "only A", "only B", "episodes", "p (McNemar)")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for task, found in [*comparison.by_task.items(), ("all", comparison.overall)]:
        table.add_row(
            task,
            f"{(found.both + found.only_first) / found.trials:.2f}",
            f"{(found.both + found.only_second) / found.trials:.2f}",
            f"{found.mean:+.2f}",
            f"{found.low:+.2f} to {found.high:+.2f}",
            str(found.only_first),
            str(found.only_second),
            str(found.trials),
            f"{found.p_value:.3f}",
        )
    console.print(table)
    better = comparison.overall
    if better.low > 0 or better.high < 0:
        console.print(f"{'B' if better.mean > 0 else 'A'} is better: the interval of the difference leaves 0 out.")
    else:
        console.print("Neither is shown to be better: the interval of the difference holds 0.")
