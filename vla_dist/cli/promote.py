"""``vla-dist promote``: a version to the canary's share of the robots, to all of them, or into the shadow."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import tyro

from vla_dist.cli.channel_place import ChannelPlace, opened_channels
from vla_dist.registry.channel_moves import person
from vla_dist.registry.sequential import CanaryRule


@dataclass(frozen=True, slots=True, kw_only=True)
class PromoteOptions(ChannelPlace):
    """Point a channel at a version; to stable only on the evidence of its canary."""

    reference: tyro.conf.Positional[str]
    """name@17."""
    to: Literal["stable", "canary", "shadow"] = "stable"
    """canary: a share of the robots, which keep it. shadow: computed and logged beside stable, never sent."""
    share: float = 0.1
    """Of the robots that a canary gets."""
    margin: float = 0.05
    """Share of successes that a canary may be short of the stable version and still be promoted."""
    confidence: float = 0.95
    """Of the bounds that promotion and roll-back are decided by."""
    min_episodes: int = 30
    """Of each of the two versions, before a promotion."""
    force: str = ""
    """A reason to promote to stable without evidence; it goes into the audit log."""


def main(arguments: Sequence[str]) -> None:
    options = tyro.cli(PromoteOptions, args=arguments, prog="vla-dist promote")
    name = options.reference.partition("@")[0]
    with opened_channels(options) as channels:
        if options.to == "canary":
            rule = CanaryRule(margin=options.margin, confidence=options.confidence, min_episodes=options.min_episodes)
            plan = channels.begin_canary(options.reference, share=options.share, rule=rule, who=person())
            print(f"{name}@{plan.version} goes to {plan.share:.0%} of the robots beside {name}@{plan.incumbent}")
        elif options.to == "shadow":
            version = channels.set_shadow(options.reference, who=person())
            print(f"{name}@{version} computes in the shadow of {name}@stable")
        else:
            version, reason = channels.promote(options.reference, force=options.force, who=person())
            print(f"{name}@stable is version {version} now: {reason}")
