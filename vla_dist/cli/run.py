"""``vla-dist run``: one preset from collection to report."""

import dataclasses
import difflib
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from vla_dist.cli.live import LiveView
from vla_dist.core.errors import ConfigError
from vla_dist.evaluation.suite import by_task
from vla_dist.run.config import RunConfig
from vla_dist.run.config_file import load_config
from vla_dist.run.files import CONFIG, CURVE, FILM, SUMMARY, find_run_dir
from vla_dist.run.launch import launch
from vla_dist.run.presets import PRESETS, preset
from vla_dist.run.summary import RunSummary

_USAGE = """usage: vla-dist run PRESET [--resume [FOLDER]] [--cameras] [options]

presets: {presets}

  --resume [FOLDER]  go on with the newest unfinished run of the preset, or with that folder; its config stays
  --cameras          train and serve a small image policy through the same path (preset PRESET-cameras)

'vla-dist run PRESET --help' lists every option of a preset with its value."""


def main(arguments: Sequence[str]) -> None:
    words = list(arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE.format(presets=", ".join(PRESETS)))
        sys.exit(0 if words else 2)
    name = words.pop(0)
    if "--cameras" in words:
        words.remove("--cameras")
        name += "-cameras"
    config, resume = preset(name), None
    if "--resume" in words:
        resume, words = _take_resume(words, config)
        if words:
            raise ConfigError(f"a resumed run keeps its config; {' '.join(words)!r} cannot be changed. Leave it out")
        config = load_config(resume / CONFIG)
    else:
        _require_known_options(words)
        config = tyro.cli(RunConfig, default=config, args=words, prog=f"vla-dist run {name}", config=_TYRO)
    logging.basicConfig(level=logging.ERROR)
    console = Console()
    with LiveView(console) as view:
        summary = launch(config, view.show, resume=resume)
    print_summary(console, summary)


_TYRO = (tyro.conf.FlagConversionOff,)


def _take_resume(words: list[str], config: RunConfig) -> tuple[Path, list[str]]:
    at = words.index("--resume")
    rest = words[:at] + words[at + 1 :]
    if at + 1 < len(words) and not words[at + 1].startswith("--"):
        folder = Path(words[at + 1])
        if not (folder / CONFIG).exists():
            raise ConfigError(f"{folder} is not the folder of a run: it has no {CONFIG}")
        return folder.resolve(), words[:at] + words[at + 2 :]
    return find_run_dir(Path(config.runs_dir), config.preset), rest


def _require_known_options(words: list[str]) -> None:
    """Tyro's own message shows the whole help; one sentence with the nearest name says more."""
    known = list(_option_names(RunConfig))
    for word in words:
        option = word.partition("=")[0].replace("_", "-")
        if option.startswith("--") and option not in (*known, "--help"):
            near = difflib.get_close_matches(option, known, n=2)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise ConfigError(f"no option {option!r}; {hint}'vla-dist run PRESET --help' lists them all")


def _option_names(kind: type, prefix: str = "--") -> Iterator[str]:
    for field in dataclasses.fields(kind):
        name = prefix + field.name.replace("_", "-")
        if isinstance(field.default_factory, type) and dataclasses.is_dataclass(field.default_factory):
            yield from _option_names(field.default_factory, f"{name}.")
        else:
            yield name


def print_summary(console: Console, summary: RunSummary) -> None:
    """The tables a person reads at the end of a run."""
    if summary.rates:
        _print_success(console, summary)
    else:
        told = ", ".join(f"v{version} ({updates})" for version, updates in summary.updates_by_version.items())
        console.print(f"versions and their updates, judged by nobody: {told}", highlight=False)
    _print_numbers(console, summary)


def _print_success(console: Console, summary: RunSummary) -> None:
    table = Table(title="success on unseen seeds by version and its updates, 95 % Wilson interval")
    table.add_column("task", no_wrap=True)
    versions = list(summary.rates)
    for version in versions:
        table.add_column(f"v{version}\n{summary.updates_by_version.get(version)}", justify="right")
    rates = {version: by_task(summary.outcomes[version]) for version in versions}
    for task in rates[versions[-1]]:
        table.add_row(task, *(f"{rates[v][task].mean:.2f}" for v in versions))
    table.add_section()
    rows = (("all", "mean"), ("interval from", "low"), ("interval to", "high"))
    for label, name in rows:
        table.add_row(label, *(f"{getattr(rate, name):.2f}" for rate in summary.rates.values()), style="bold")
    console.print(table)
    if summary.language:
        language = Table(title="one scene, three tasks: only the words differ")
        for heading in ("words said", "success", "95 % interval", "did what was said"):
            language.add_column(heading, justify="right")
        for mode, rate in summary.language_rates.items():
            obeyed = sum(o.obeyed for o in summary.language[mode]) / rate.trials
            told = "-" if mode == "zeroed" else f"{obeyed:.2f}"
            language.add_row(mode, f"{rate.mean:.2f}", f"{rate.low:.2f}-{rate.high:.2f}", told)
        console.print(language)


def _print_numbers(console: Console, summary: RunSummary) -> None:
    console.print(
        f"{summary.steps_collected:,} steps collected, {summary.updates:,} updates, {summary.served_calls:,} served "
        f"calls ({summary.served_calls_failed} failed), p50 {summary.call_p50_ms:.0f} ms, p99 "
        f"{summary.call_p99_ms:.0f} ms, {sum(summary.phase_seconds.values()):.0f} s, peak memory "
        f"{summary.peak_memory_mb:,.0f} MB",
        highlight=False,
    )
    for note in summary.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    for name in (SUMMARY, CURVE, FILM):
        if (summary.run_dir / name).exists():
            console.print(f"  {summary.run_dir / name}", highlight=False, soft_wrap=True)
