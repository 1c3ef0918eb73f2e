"""``vla-dist rollback``: end a canary, or take the stable channel back to where it was."""

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from vla_dist.cli.channel_place import ChannelPlace, opened_channels
from vla_dist.registry.channel_moves import person


@dataclass(frozen=True, slots=True, kw_only=True)
class RollbackOptions(ChannelPlace):
    """End the canary that runs; where none does, point stable at the version before."""

    name: tyro.conf.Positional[str]
    """Of the policy."""
    reason: str = "by hand"
    """For the audit log."""


def main(arguments: Sequence[str]) -> None:
    options = tyro.cli(RollbackOptions, args=arguments, prog="vla-dist rollback")
    with opened_channels(options) as channels:
        print(channels.roll_back(options.name, reason=options.reason, who=person()))
