"""``vla-dist models``: the members of the zoo, their sizes and what they need."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import tyro
from rich.console import Console
from rich.table import Table

from vla_dist.models.catalogue import CatalogueEntry, catalogue, reference_spec
from vla_dist.models.zoo import ARCHITECTURES, architecture


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelsOptions:
    """The members of the zoo, their sizes and what they need; parameters for an arm of 39 readings and 4 actions."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Members; all where left out."""
    json: bool = False
    """Print JSON instead of a table."""


def main(arguments: Sequence[str]) -> None:
    options = tyro.cli(ModelsOptions, args=arguments, prog="vla-dist models")
    members = [architecture(name) for name in options.names or ARCHITECTURES]
    entries = {member.name: catalogue(member, reference_spec()) for member in members}
    if options.json:
        print(json.dumps([asdict(entry) for found in entries.values() for entry in found], indent=2))
        return
    console = Console()
    for name, found in entries.items():
        table = Table(title=f"{name}: {found[0].source}")
        for heading in ("preset", "parameters", "trainable", "K", "H", "head", "needs"):
            table.add_column(heading, justify="left" if heading in ("preset", "head", "needs") else "right")
        for entry in found:
            table.add_row(*_cells(entry))
        console.print(table)
    console.print(
        "vla-dist run PRESET --model.architecture NAME --model.preset PRESET --model.changes setting=value ...",
        highlight=False,
        markup=False,
    )


def _cells(entry: CatalogueEntry) -> tuple[str, ...]:
    return (
        entry.preset,
        f"{entry.num_parameters:,}",
        f"{entry.num_trainable:,}",
        str(entry.context_steps),
        str(entry.horizon),
        entry.head,
        ", ".join(entry.needs) or "-",
    )
