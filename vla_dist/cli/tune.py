"""``vla-dist tune``: a search over settings of a preset."""

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from vla_dist.core.errors import ConfigError
from vla_dist.run.build import Place
from vla_dist.run.config_file import load_config
from vla_dist.run.files import CONFIG, find_run_dir, new_run_dir
from vla_dist.run.presets import PRESETS, preset
from vla_dist.run.reach import reach_store


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOptions:
    """Train on the replay of a run with other settings, many times, and judge each on unseen seeds."""

    preset: tyro.conf.Positional[str]
    """Whose runs to look at."""
    over: tuple[str, ...]
    """What to search: learner.learning_rate=log:1e-4:1e-2 model.n_layers=1,2,3 learner.ema_decay=uniform:0:0.999"""
    num_trials: int = 8
    num_parallel: int = 1
    """Trials at once, each on one CPU."""
    run: Path | None = None
    """Folder of the run that collected the data; the preset's newest one where left out."""
    seed: int = 0


def main(arguments: Sequence[str]) -> None:
    if not arguments:
        print(f"usage: vla-dist tune PRESET --over SETTING=a,b,c [options]\n\npresets: {', '.join(PRESETS)}")
        sys.exit(2)
    options = tyro.cli(TuneOptions, args=arguments, prog="vla-dist tune")
    preset(options.preset)
    run_dir = (options.run or find_run_dir(Path("runs"), options.preset)).resolve()
    if not (run_dir / CONFIG).exists():
        raise ConfigError(f"{run_dir} is not the folder of a run; collect data with 'vla-dist run {options.preset}'")
    config = load_config(run_dir / CONFIG)
    if config.preset != options.preset:
        raise ConfigError(f"{run_dir} is a run of {config.preset!r}, not of {options.preset!r}; give one of those")

    from vla_dist.run.launch import ray_runtime
    from vla_dist.run.tuning import free_readers, parse_space, search

    space = parse_space(options.over, config)
    logging.basicConfig(level=logging.ERROR)
    folder = new_run_dir(Path(config.runs_dir), f"tune-{options.preset}")
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(reach_store(run_dir))
        stack.enter_context(ray_runtime(num_cpus=options.num_parallel))
        place = dataclasses.replace(Place.of(config, run_dir, store), run_id=folder.name)
        stack.enter_context(free_readers(place))
        trials = search(
            place,
            space,
            num_trials=options.num_trials,
            num_parallel=options.num_parallel,
            folder=folder,
            seed=options.seed,
        )
    table = Table(title=f"{len(trials)} trials, the best one first")
    for path in space:
        table.add_column(path, justify="right")
    for heading in ("success", "loss", "error"):
        table.add_column(heading, justify="right")
    for trial in trials:
        values = (trial.settings.get(path) for path in space)
        cells = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in values)
        table.add_row(*cells, f"{trial.success:.2f}", f"{trial.loss:.4g}", trial.error)
    console = Console()
    console.print(table)
    console.print(f"  {folder / 'trials.json'}; curves: tensorboard --logdir {folder}", highlight=False, soft_wrap=True)
