"""Channels moved by people: a canary begun, a version promoted on evidence, a bad one taken back."""

import contextlib
from collections.abc import Iterator
from typing import Any

from vla_dist.core.errors import ConfigError, MoveRefused, NotFound
from vla_dist.registry.canaries import RedisCanaries
from vla_dist.registry.canary_plan import CanaryPlan
from vla_dist.registry.channel_moves import CANARY, SHADOW, STABLE, ChannelReport
from vla_dist.registry.sequential import CanaryRule, Tally
from vla_dist.registry.store import RedisPolicyRegistry


class Promotion:
    """Implements ``ChannelMoves`` on a registry and its canaries, which stay the caller's."""

    def __init__(self, registry: RedisPolicyRegistry, canaries: RedisCanaries) -> None:
        self._registry = registry
        self._canaries = canaries

    def reports(self, name: str = "") -> list[ChannelReport]:
        return [self._report(one) for one in ([name] if name else self._registry.names())]

    def audit(self, max_entries: int) -> list[dict[str, Any]]:
        return self._canaries.audit()[-max_entries:] if max_entries > 0 else []

    def begin_canary(self, reference: str, *, share: float, rule: CanaryRule, who: str) -> CanaryPlan:
        name, version = self._resolve(reference)
        with self._refusals("canary", name=name, version=version, who=who):
            incumbent = self._registry.resolve(f"{name}@{STABLE}")
            manifests = {manifest.version: manifest for manifest in self._registry.manifests(name)}
            plan = CanaryPlan(name=name, version=version, incumbent=incumbent, share=share, rule=rule)
            differences = manifests[incumbent].spec.differences(manifests[version].spec)
            if differences:
                raise MoveRefused(
                    f"{name}@{version} has another contract than the stable {name}@{incumbent} "
                    f"({'; '.join(differences)}), so its robots are others; publish it under another name"
                )
            self._registry.set_channel(name, CANARY, version)
            return self._canaries.begin(plan, who=who)

    def promote(self, reference: str, *, force: str = "", who: str) -> tuple[int, str]:
        name, version = self._resolve(reference)
        plan = self._canaries.plan(name)
        mine = plan if plan is not None and plan.is_running and plan.version == version else None
        verdict = None if mine is None else self._canaries.verdict(mine)
        with self._refusals("stable", name=name, version=version, who=who):
            if not force and (verdict is None or verdict.decision != "promote"):
                why = "no canary of it runs" if verdict is None else verdict.reason
                raise MoveRefused(
                    f"{name}@{version} is not promoted: {why}. Let its canary run on ('vla-dist promote "
                    f"{name}@{version} --to canary --share 0.1' begins one), or say why not with --force REASON"
                )
        previous = self._registry.channels(name).get(STABLE, 0)
        self._registry.set_channel(name, STABLE, version)
        reason = f"forced: {force}" if force else verdict.reason if verdict else ""
        if mine is not None:
            self._canaries.end(name, "promoted", reason, who=who, plan_id=mine.plan_id)
        self._canaries.note("stable", who=who, name=name, version=version, previous=previous, reason=reason)
        return version, reason

    def set_shadow(self, reference: str, *, who: str) -> int:
        name, version = self._resolve(reference)
        self._registry.set_channel(name, SHADOW, version)
        self._canaries.note("shadow", who=who, name=name, version=version)
        return version

    def roll_back(self, name: str, *, reason: str, who: str) -> str:
        plan = self._canaries.plan(name)
        if plan is not None and self._canaries.end(name, "rolled_back", reason, who=who):
            self._registry.set_channel(name, CANARY, plan.incumbent)
            back = f"{name}@{plan.incumbent}"
            return f"the canary {name}@{plan.version} is ended; its robots get {back} with the next episode"
        stable = self._registry.channels(name).get(STABLE, 0)
        moves = [move for move in self._registry.history(name) if move.channel == STABLE and move.version == stable]
        previous = moves[-1].previous if moves else 0
        if not previous:
            raise NotFound(f"{name} has no canary that runs, and its stable channel no earlier version to go back to")
        self._registry.set_channel(name, STABLE, previous)
        self._canaries.note("stable", who=who, name=name, version=previous, previous=stable, reason=reason)
        return f"{name}@stable goes from {stable} back to {previous}; robots get it with their next episode"

    def _report(self, name: str) -> ChannelReport:
        channels = self._registry.channels(name)
        if not channels and not self._registry.manifests(name):
            raise NotFound(f"no policy {name!r}; published are {', '.join(self._registry.names()) or 'none'}")
        plan = self._canaries.plan(name)
        canary, incumbent = (Tally(), Tally()) if plan is None else self._canaries.tallies(plan)
        verdict = self._canaries.verdict(plan) if plan is not None and plan.is_running else None
        return ChannelReport(
            name=name, channels=channels, plan=plan, canary=canary, incumbent=incumbent, verdict=verdict
        )

    def _resolve(self, reference: str) -> tuple[str, int]:
        return reference.partition("@")[0], self._registry.resolve(reference)

    @contextlib.contextmanager
    def _refusals(self, channel: str, *, name: str, version: int, who: str) -> Iterator[None]:
        """A move that may not be made is one kind of error, and in the audit log like those that were made."""
        try:
            yield
        except ConfigError as error:
            reason = str(error)
            self._canaries.note("refused", who=who, name=name, version=version, channel=channel, reason=reason)
            raise MoveRefused(reason) from error
