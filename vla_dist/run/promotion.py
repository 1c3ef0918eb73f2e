"""Channels moved by people: a canary begun, a version promoted on evidence, a bad one taken back."""

import getpass
import socket
from dataclasses import dataclass

from vla_dist.core.errors import ConfigError, NotFound
from vla_dist.registry.canaries import RedisCanaries
from vla_dist.registry.canary_plan import CanaryPlan
from vla_dist.registry.sequential import CanaryRule, Tally, Verdict, success_bounds
from vla_dist.registry.store import RedisPolicyRegistry

STABLE, CANARY, SHADOW = "stable", "canary", "shadow"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelReport:
    """What one policy's channels are and how its newest canary does."""

    name: str
    channels: dict[str, int]
    plan: CanaryPlan | None
    canary: Tally
    incumbent: Tally
    verdict: Verdict | None
    """Of a running plan."""

    def bounds(self, tally: Tally) -> tuple[float, float]:
        confidence = 0.95 if self.plan is None else self.plan.rule.confidence
        return success_bounds(tally, confidence=1 - (1 - confidence) / 2)


def report_channels(registry: RedisPolicyRegistry, canaries: RedisCanaries, name: str) -> ChannelReport:
    """Raises NotFound where nothing of that name is published."""
    channels = registry.channels(name)
    if not channels and not registry.manifests(name):
        raise NotFound(f"no policy {name!r}; published are {', '.join(registry.names()) or 'none'}")
    plan = canaries.plan(name)
    canary, incumbent = (Tally(), Tally()) if plan is None else canaries.tallies(plan)
    verdict = canaries.verdict(plan) if plan is not None and plan.is_running else None
    return ChannelReport(name=name, channels=channels, plan=plan, canary=canary, incumbent=incumbent, verdict=verdict)


def begin_canary(
    registry: RedisPolicyRegistry, canaries: RedisCanaries, name: str, version: int, *, share: float, rule: CanaryRule
) -> CanaryPlan:
    """Give a version to a share of the robots.

    Raises:
        NotFound: no such version, or no stable one that it could be compared with.
        ConfigError: it is the stable one, or its contract is another.
    """
    incumbent = registry.resolve(f"{name}@{STABLE}")
    manifests = {manifest.version: manifest for manifest in registry.manifests(name)}
    plan = CanaryPlan(name=name, version=version, incumbent=incumbent, share=share, rule=rule)
    differences = manifests[incumbent].spec.differences(manifests[version].spec)
    if differences:
        raise ConfigError(
            f"{name}@{version} has another contract than the stable {name}@{incumbent} ({'; '.join(differences)}), so "
            "its robots are others; publish it under another name"
        )
    registry.set_channel(name, CANARY, version)
    return canaries.begin(plan, who=who())


def promote(registry: RedisPolicyRegistry, canaries: RedisCanaries, name: str, version: int, *, force: str = "") -> str:
    """Point ``stable`` at a version that its canary has shown to be no worse; the sentence that says why.

    Args:
        force: a reason to promote without that evidence; it goes into the audit log.

    Raises:
        ConfigError: the evidence is missing, and no reason was given.
    """
    plan = canaries.plan(name)
    mine = plan if plan is not None and plan.is_running and plan.version == version else None
    verdict = None if mine is None else canaries.verdict(mine)
    if not force and (verdict is None or verdict.decision != "promote"):
        why = "no canary of it runs" if verdict is None else verdict.reason
        raise ConfigError(
            f"{name}@{version} is not promoted: {why}. Let its canary run on ('vla-dist promote {name}@{version} --to "
            "canary --share 0.1' begins one), or say why not with --force REASON"
        )
    previous = registry.channels(name).get(STABLE, 0)
    registry.set_channel(name, STABLE, version)
    reason = f"forced: {force}" if force else verdict.reason if verdict else ""
    if mine is not None:
        canaries.end(name, "promoted", reason, who=who(), plan_id=mine.plan_id)
    canaries.note("stable", who=who(), name=name, version=version, previous=previous, reason=reason)
    return reason


def set_shadow(registry: RedisPolicyRegistry, canaries: RedisCanaries, name: str, version: int) -> None:
    """Let a version compute beside the stable one, unheard."""
    registry.set_channel(name, SHADOW, version)
    canaries.note("shadow", who=who(), name=name, version=version)


def roll_back(registry: RedisPolicyRegistry, canaries: RedisCanaries, name: str, *, reason: str) -> str:
    """End the canary that runs, or else point ``stable`` at what it pointed at before; what was done.

    Raises:
        NotFound: no canary runs, and stable has no earlier version.
    """
    plan = canaries.plan(name)
    if plan is not None and canaries.end(name, "rolled_back", reason, who=who()):
        registry.set_channel(name, CANARY, plan.incumbent)
        return (
            f"the canary {name}@{plan.version} is ended; its robots get {name}@{plan.incumbent} with the next episode"
        )
    stable = registry.channels(name).get(STABLE, 0)
    moves = [move for move in registry.history(name) if move.channel == STABLE and move.version == stable]
    previous = moves[-1].previous if moves else 0
    if not previous:
        raise NotFound(f"{name} has no canary that runs, and its stable channel no earlier version to go back to")
    registry.set_channel(name, STABLE, previous)
    canaries.note("stable", who=who(), name=name, version=previous, previous=stable, reason=reason)
    return f"{name}@stable goes from {stable} back to {previous}; robots get it with their next episode"


def who() -> str:
    """User and machine, for the audit log."""
    return f"{getpass.getuser()}@{socket.gethostname()}"
