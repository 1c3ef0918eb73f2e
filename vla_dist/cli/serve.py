"""``vla-dist serve``: the policies of a run to robots over gRPC."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from vla_dist.core.errors import ConfigError
from vla_dist.run.reopen import reopen, serve_fleet, serve_single


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Serve the policies of a run to robots over gRPC, until Ctrl-C."""

    run_dir: tyro.conf.Positional[Path]
    """Folder of the run, for example runs/demo-20260101-120000."""
    single: bool = False
    """One process on plain gRPC instead of Ray Serve: for one machine and few robots."""
    host: str = "127.0.0.1"
    """Address to bind; 0.0.0.0 lets other machines in."""
    port: int = 9000
    num_replicas: int = 1
    token: str = ""
    """Bearer token that every call must carry."""


def main(arguments: Sequence[str]) -> None:
    options = tyro.cli(ServeOptions, args=arguments, prog="vla-dist serve")
    if options.host not in ("127.0.0.1", "localhost", "::1") and not options.token:
        raise ConfigError(
            f"--host {options.host} lets other machines in; set --token as well, so that not everybody can"
        )
    with reopen(options.run_dir) as place:

        def say(address: str) -> None:
            print(f"serving {place.config.reference} on {address}; Ctrl-C ends it", flush=True)

        common = {"host": options.host, "port": options.port, "token": options.token or None, "on_ready": say}
        if options.single:
            serve_single(place, **common)
        else:
            serve_fleet(place, num_replicas=options.num_replicas, **common)
