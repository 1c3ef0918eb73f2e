"""``vla-dist serve``: the policies of a run to robots over gRPC."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from vla_dist.core.errors import ConfigError
from vla_dist.run.files import AUDIT
from vla_dist.run.reopen import reopen, serve_fleet, serve_single, service_id
from vla_dist.serving.authorisation import LOOPBACK, AccessConfig


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
    """Bearer token that every call must carry; it may do everything."""
    tokens: Path | None = None
    """File of tokens with roles, as 'vla-dist token create' writes it; read again when it changes."""
    identity_from_front: bool = False
    """Robots are known by the name in their certificate, as the TLS front of deploy/tls/ passes it on. The port must
    be on loopback then, so that nobody else can pass a name."""


def main(arguments: Sequence[str]) -> None:
    options = tyro.cli(ServeOptions, args=arguments, prog="vla-dist serve")
    is_open = options.host not in LOOPBACK
    if is_open and not options.token and options.tokens is None:
        raise ConfigError(
            f"--host {options.host} lets other machines in; set --tokens or --token as well, so that not everybody can"
        )
    if is_open and options.identity_from_front:
        raise ConfigError(
            f"--identity-from-front believes whoever reaches the port, and --host {options.host} lets everybody reach "
            "it; leave --host on loopback and let robots come through the front"
        )
    with reopen(options.run_dir) as place:

        def say(address: str) -> None:
            name = service_id(place)
            print(f"serving {place.config.reference} on {address} as service {name}; Ctrl-C ends it", flush=True)

        access = AccessConfig(
            token=options.token or None,
            tokens_file=options.tokens,
            identity_from_front=options.identity_from_front,
            audit=place.run_dir / AUDIT,
        )
        common = {"host": options.host, "port": options.port, "access": access, "on_ready": say}
        if options.single:
            serve_single(place, **common)
        else:
            serve_fleet(place, num_replicas=options.num_replicas, **common)
