"""``vla-dist doctor``: what this machine has and what is missing; whether a live server answers alike by every way."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from vla_dist.core.protocols import Policy
from vla_dist.run.preflight import findings


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorOptions:
    """What this machine has and what is missing; with --server, whether that server answers alike by every way."""

    port: int = 9000
    """gRPC port that a run would use."""
    server: str = ""
    """host:port of a live policy server: the same observations by stream, unary, batched, renewed, reconnected, beside
    another version and, with --run, in this process must give the same actions."""
    policy: str = ""
    """Of the server: name@channel; the first it lists where left out."""
    token: str = ""
    """Of the role operator or admin, where the server wants one."""
    ca: Path | None = None
    """PEM file of whom to trust, where a TLS front stands before the server."""
    run: Path | None = None
    """Folder of the run that is served: its version is loaded here too."""


def main(arguments: Sequence[str]) -> None:
    options = tyro.cli(DoctorOptions, args=arguments, prog="vla-dist doctor")
    console = Console()
    wrong = _check_server(options, console) if options.server else _check_machine(options, console)
    if wrong:
        raise SystemExit(1)


def _check_machine(options: DoctorOptions, console: Console) -> int:
    missing = 0
    for finding in findings(options.port):
        missing += not finding.ok
        mark = "[green]ok[/]     " if finding.ok else "[red]missing[/]"
        console.print(f"{mark} [bold]{finding.name}[/]: ", end="", highlight=False)
        console.print(finding.text, markup=False, highlight=False, end="")
        console.print("" if finding.ok else f"  (needed for {finding.needed_for})", markup=False, highlight=False)
    console.print("nothing is missing" if not missing else f"{missing} missing; see above", highlight=False)
    return missing


def _check_server(options: DoctorOptions, console: Console) -> int:
    from vla_dist.robot.tls import TlsFiles
    from vla_dist.run.parity import compare_ways

    tls = None if options.ca is None else TlsFiles(ca=options.ca)
    wrong = 0
    for one in compare_ways(
        options.server,
        policy=options.policy,
        in_process=None if options.run is None else _loader(options.run),
        token=options.token or None,
        tls=tls,
    ):
        wrong += not one.ok
        mark = "[green]ok[/]     " if one.ok else "[red]differs[/]"
        console.print(f"{mark} [bold]{one.way}[/]: ", end="", highlight=False)
        console.print(one.text, markup=False, highlight=False)
    console.print("all ways give the same actions" if not wrong else f"{wrong} differ; see above", highlight=False)
    return wrong


def _loader(run_dir: Path) -> Callable[[str, int], Policy[Any]]:
    from vla_dist.run.composition.learning import build_policy_loader
    from vla_dist.run.config_file import load_config
    from vla_dist.run.files import CONFIG
    from vla_dist.run.reach import reach_registry

    def load(name: str, version: int) -> Policy[Any]:
        with reach_registry(run_dir) as registry:
            return build_policy_loader(load_config(run_dir / CONFIG))(registry.fetch(name, version))

    return load
