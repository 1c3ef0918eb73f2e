"""``vla-dist rollback``: end a canary, or take the stable channel back to where it was."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from vla_dist.cli.registry import RegistryPlace, opened_registry
from vla_dist.registry.canaries import RedisCanaries
from vla_dist.run import promotion


@dataclass(frozen=True, slots=True, kw_only=True)
class RollbackOptions(RegistryPlace):
    """End the canary that runs; where none does, point stable at the version before."""

    name: tyro.conf.Positional[str]
    """Of the policy."""
    reason: str = "by hand"
    """For the audit log."""


def main(arguments: Sequence[str]) -> None:
    options = tyro.cli(RollbackOptions, args=arguments, prog="vla-dist rollback")
    with (
        opened_registry(options) as registry,
        contextlib.closing(RedisCanaries(registry.url)) as canaries,
    ):
        print(promotion.roll_back(registry, canaries, options.name, reason=options.reason))
