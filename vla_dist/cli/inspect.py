"""``vla-dist inspect``: what a run holds."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from vla_dist.run.composition.stores import build_registry, build_table
from vla_dist.run.files import SUMMARY, find_run_dir
from vla_dist.run.reopen import reopen


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectOptions:
    """What a run holds: config, versions, replay."""

    run_dir: tyro.conf.Positional[Path | None] = None
    """Folder of the run; the newest in runs/ where left out."""
    config: bool = False
    """Print the whole resolved config as well."""


def main(arguments: Sequence[str]) -> None:
    options = tyro.cli(InspectOptions, args=arguments, prog="vla-dist inspect")
    console = Console()
    with reopen(options.run_dir or find_run_dir(Path("runs"))) as place:
        registry, table = build_registry(place), build_table(place)
        state = "finished" if (place.run_dir / SUMMARY).exists() else "unfinished: vla-dist run can --resume it"
        console.print(f"{place.run_dir} ({state})", highlight=False, soft_wrap=True)
        channels = registry.channels(place.config.preset)
        versions = Table(title=f"versions of {place.config.preset}")
        for heading in ("version", "updates", "parent", "size", "published", "channels", "SHA-256"):
            versions.add_column(heading, justify="right")
        for manifest in registry.manifests(place.config.preset):
            versions.add_row(
                str(manifest.version),
                f"{manifest.metrics.get('updates', 0):.0f}",
                str(manifest.parent or "-"),
                f"{manifest.num_bytes / 2**20:.2f} MB",
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.created_unix_s)),
                ", ".join(name for name, version in channels.items() if version == manifest.version),
                manifest.tensors_sha256[:12],
            )
        console.print(versions)
        stats = table.stats()
        console.print(
            f"replay: {stats.num_steps:,} steps in {stats.num_episodes:,} episodes, {stats.steps_inserted:,} steps "
            f"inserted and {stats.steps_sampled:,} windows sampled ({stats.samples_per_insert:.1f} per insert), "
            f"{stats.duplicates} duplicates refused, {stats.num_bytes / 2**20:.0f} MB",
            highlight=False,
        )
        if place.config.replay.archive:
            state = table.state()
            console.print(
                f"archive {place.config.replay.archive}: {state.archived:,} of {state.completions:,} complete episodes "
                "archived",
                highlight=False,
            )
        for task, episodes in sorted(stats.episodes_by_task.items()):
            console.print(f"  {task}: {episodes} episodes", highlight=False)
        if options.config:
            console.print_json(place.config.to_json())
