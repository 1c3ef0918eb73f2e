"""``vla-dist tune``: a search over settings of a preset."""

import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from rich.console import Console
from rich.table import Table

from vla_dist.core.errors import ConfigError
from vla_dist.run.composition.place import Place
from vla_dist.run.config import RunConfig
from vla_dist.run.config_file import load_config
from vla_dist.run.files import CONFIG, find_run_dir, new_run_dir
from vla_dist.run.presets import PRESETS, preset
from vla_dist.run.reach import reach_store

if TYPE_CHECKING:
    from vla_dist.run.tuning import Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOptions:
    """Try other settings many times, and judge each on unseen seeds.

    Settings of the learner and the model are tried on the replay of a run; with any other setting each trial is a run
    of its own.
    """

    preset: tyro.conf.Positional[str]
    """Whose runs to look at."""
    over: tuple[str, ...]
    """What to search: learner.learning_rate=log:1e-4:1e-2 model.n_layers=1,2,3 learner.ema_decay=uniform:0:0.999
    'rollout.noise_scales=[[0], [0, 0.4]]'"""
    num_trials: int = 8
    num_parallel: int = 1
    """Trials at once, each on one CPU, or each a whole run."""
    run: Path | None = None
    """Folder of the run that collected the data, and whose settings the trials change; left out: the preset's newest
    one, or for trials that are runs of their own the preset itself."""
    seed: int = 0


def main(arguments: Sequence[str]) -> None:
    if not arguments:
        print(f"usage: vla-dist tune PRESET --over SETTING=a,b,c [options]\n\npresets: {', '.join(PRESETS)}")
        sys.exit(2)
    options = tyro.cli(TuneOptions, args=arguments, prog="vla-dist tune")
    base = preset(options.preset)
    logging.basicConfig(level=logging.ERROR)

    from vla_dist.run.tuning import needs_whole_runs, parse_space

    space = parse_space(options.over, base)
    if needs_whole_runs(space):
        folder, trials = _search_runs(options)
    else:
        folder, trials = _search_on_replay(options)
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


def _search_on_replay(options: TuneOptions) -> "tuple[Path, list[Trial]]":
    from vla_dist.run.launch import ray_runtime
    from vla_dist.run.tuning import free_readers, parse_space, search, trial_on_replay

    run_dir = (options.run or find_run_dir(Path("runs"), options.preset)).resolve()
    config = _config_of(run_dir, options.preset)
    space = parse_space(options.over, config)
    folder = new_run_dir(Path(config.runs_dir), f"tune-{options.preset}")
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(reach_store(run_dir))
        stack.enter_context(ray_runtime(num_cpus=options.num_parallel))
        place = dataclasses.replace(Place.of(config, run_dir, store), run_id=folder.name)
        stack.enter_context(free_readers(place))
        return folder, search(trial_on_replay(place), space, folder=folder, **_of_search(options))


def _search_runs(options: TuneOptions) -> "tuple[Path, list[Trial]]":
    from vla_dist.run.launch import ray_runtime
    from vla_dist.run.tuning import parse_space, search
    from vla_dist.run.whole_trials import trial_of_run

    config = preset(options.preset) if options.run is None else _config_of(options.run.resolve(), options.preset)
    space = parse_space(options.over, config)
    folder = new_run_dir(Path(config.runs_dir), f"tune-{options.preset}")
    environment = dict(os.environ)
    with ray_runtime(num_cpus=options.num_parallel):
        trial = trial_of_run(config, environment)
        return folder, search(trial, space, folder=folder, **_of_search(options))


def _of_search(options: TuneOptions) -> dict[str, int]:
    return {"num_trials": options.num_trials, "num_parallel": options.num_parallel, "seed": options.seed}


def _config_of(run_dir: Path, name: str) -> RunConfig:
    if not (run_dir / CONFIG).exists():
        raise ConfigError(f"{run_dir} is not the folder of a run; collect data with 'vla-dist run {name}'")
    config = load_config(run_dir / CONFIG)
    if config.preset != name:
        raise ConfigError(f"{run_dir} is a run of {config.preset!r}, not of {name!r}; give one of those")
    return config
