"""``vla-dist promote``: a version to the canary's share of the robots, to all of them, or into the shadow."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import tyro

from vla_dist.cli.registry import RegistryPlace, opened_registry
from vla_dist.registry.canaries import RedisCanaries
from vla_dist.registry.sequential import CanaryRule
from vla_dist.run import promotion


@dataclass(frozen=True, slots=True, kw_only=True)
class PromoteOptions(RegistryPlace):
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
    with (
        opened_registry(options) as registry,
        contextlib.closing(RedisCanaries(registry.url)) as canaries,
    ):
        name, version = options.reference.partition("@")[0], registry.resolve(options.reference)
        if options.to == "canary":
            rule = CanaryRule(margin=options.margin, confidence=options.confidence, min_episodes=options.min_episodes)
            plan = promotion.begin_canary(registry, canaries, name, version, share=options.share, rule=rule)
            print(f"{name}@{version} goes to {plan.share:.0%} of the robots beside {name}@{plan.incumbent}")
        elif options.to == "shadow":
            promotion.set_shadow(registry, canaries, name, version)
            print(f"{name}@{version} computes in the shadow of {name}@stable")
        else:
            reason = promotion.promote(registry, canaries, name, version, force=options.force)
            print(f"{name}@stable is version {version} now: {reason}")
