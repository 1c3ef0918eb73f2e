"""``vla-dist doctor``: what this machine has and what is missing."""

from collections.abc import Sequence
from dataclasses import dataclass

import tyro
from rich.console import Console

from vla_dist.run.preflight import findings


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorOptions:
    """What this machine has and what is missing."""

    port: int = 9000
    """gRPC port that a run would use."""


def main(arguments: Sequence[str]) -> None:
    options = tyro.cli(DoctorOptions, args=arguments, prog="vla-dist doctor")
    console = Console()
    missing = 0
    for finding in findings(options.port):
        missing += not finding.ok
        mark = "[green]ok[/]     " if finding.ok else "[red]missing[/]"
        console.print(f"{mark} [bold]{finding.name}[/]: ", end="", highlight=False)
        console.print(finding.text, markup=False, highlight=False, end="")
        console.print("" if finding.ok else f"  (needed for {finding.needed_for})", markup=False, highlight=False)
    console.print("nothing is missing" if not missing else f"{missing} missing; see above", highlight=False)
    if missing:
        raise SystemExit(1)
