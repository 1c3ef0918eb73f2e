"""Whose channels a verb is about: those of a registry at hand, or of a service somewhere else."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vla_dist.cli.registry import RegistryPlace, opened_registry
from vla_dist.core.errors import ConfigError
from vla_dist.registry.canaries import RedisCanaries
from vla_dist.registry.channel_moves import ChannelMoves
from vla_dist.registry.promotion import Promotion


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelPlace(RegistryPlace):
    """Which channels a verb is about."""

    server: str = ""
    """host:port of a running service, in place of --run and --redis-url: its channels, by gRPC."""
    token: str = ""
    """Of the server: operator to look, admin to move. Left out: VLA_DIST_FLEET_TOKEN of the environment, which other
    users of the machine do not see."""
    ca: Path | None = None
    """PEM file of whom to trust, where a TLS front stands before the server."""


@contextlib.contextmanager
def opened_channels(options: ChannelPlace) -> Iterator[ChannelMoves]:
    """The channels that the options name, for as long as the block runs."""
    if not options.server:
        with opened_registry(options) as registry, contextlib.closing(RedisCanaries(registry.url)) as canaries:
            yield Promotion(registry, canaries)
        return
    if options.run is not None or options.redis_url:
        raise ConfigError("--server and --run or --redis-url name two places; give one of them")
    from vla_dist.robot.client import PolicyClient
    from vla_dist.robot.tls import TlsFiles
    from vla_dist.run.serve_settings import TOKEN_VARIABLE
    from vla_dist.serving.channel_client import ChannelClient

    token = options.token or os.environ.get(TOKEN_VARIABLE) or None
    tls = None if options.ca is None else TlsFiles(ca=options.ca)
    with PolicyClient(options.server, token=token, tls=tls) as client:
        yield ChannelClient(client.channel, address=options.server, metadata=client.call_metadata)
