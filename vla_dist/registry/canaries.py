"""Canaries in Redis: which version which share of the robots gets, what became of its episodes, who moved what.

Keys, under the registry's hash tag: ``{registry}:canary:NAME`` (JSON of the newest plan), ``{registry}:tally:PLAN``
(hash, ``VERSION:trials`` and ``VERSION:successes``), ``{registry}:counted:PLAN`` (set of episodes),
``{registry}:audit`` (list of JSON, oldest first) and ``{registry}:service-key``.
"""

import dataclasses
import json
import os
import time
import uuid
from typing import Any, cast

from vla_dist.core.errors import NotFound
from vla_dist.registry.canary_plan import CanaryPlan, PlanState
from vla_dist.registry.connection import connect, named_errors
from vla_dist.registry.sequential import CanaryRule, Tally, Verdict, judge_canary

_SOCKET_TIMEOUT_S = 5.0
_KEEP_S = 90 * 86_400
_MAX_AUDIT_ENTRIES = 10_000
_AUDIT = "{registry}:audit"


class RedisCanaries:
    """Implements ``CanaryStore`` beside a RedisPolicyRegistry; construct one in each process."""

    def __init__(self, url: str) -> None:
        self._client = connect(url, socket_timeout_s=_SOCKET_TIMEOUT_S)

    def begin(self, plan: CanaryPlan, *, who: str) -> CanaryPlan:
        """Start a canary, in place of one that may run. Its episodes are counted from now on."""
        plan = dataclasses.replace(plan, plan_id=uuid.uuid4().hex, state="running", started_unix_s=time.time())
        with named_errors():
            self._client.set(_plan(plan.name), json.dumps(dataclasses.asdict(plan)))
        self.note("canary", who=who, name=plan.name, version=plan.version, share=plan.share, incumbent=plan.incumbent)
        return plan

    def plan(self, name: str) -> CanaryPlan | None:
        with named_errors():
            text = cast("bytes | None", self._client.get(_plan(name)))
        if text is None:
            return None
        fields = json.loads(text)
        return CanaryPlan(**{**fields, "rule": CanaryRule(**fields["rule"])})

    def record(self, name: str, version: int, episode_id: str, *, success: bool) -> Verdict | None:
        plan = self.plan(name)
        if plan is None or not plan.is_running or version not in (plan.version, plan.incumbent):
            return None
        counted, tally = _counted(plan), _tally(plan)
        with named_errors():
            if self._client.sadd(counted, f"{version}:{episode_id}"):
                with self._client.pipeline() as pipe:
                    pipe.hincrby(tally, f"{version}:trials", 1)
                    pipe.hincrby(tally, f"{version}:successes", int(success))
                    for key in (counted, tally):
                        pipe.expire(key, _KEEP_S)
                    pipe.execute()
        return self.verdict(plan)

    def tallies(self, plan: CanaryPlan) -> tuple[Tally, Tally]:
        """Of the canary and of the incumbent."""
        with named_errors():
            found = cast("dict[bytes, bytes]", self._client.hgetall(_tally(plan)))
        counts = {key.decode(): int(value) for key, value in found.items()}

        def of(version: int) -> Tally:
            trials, successes = counts.get(f"{version}:trials", 0), counts.get(f"{version}:successes", 0)
            return Tally(successes=min(successes, trials), trials=trials)

        return of(plan.version), of(plan.incumbent)

    def verdict(self, plan: CanaryPlan) -> Verdict:
        return judge_canary(*self.tallies(plan), plan.rule)

    def end(self, name: str, state: PlanState, reason: str, *, who: str, plan_id: str = "") -> bool:
        """Args:
        plan_id: end this plan only; empty: whichever runs.
        """
        plan = self.plan(name)
        if plan is None or not plan.is_running or (plan_id and plan.plan_id != plan_id):
            return False
        ended = dataclasses.replace(plan, state=state, reason=reason)
        with named_errors():
            self._client.set(_plan(name), json.dumps(dataclasses.asdict(ended)))
        self.note(state, who=who, name=name, version=plan.version, incumbent=plan.incumbent, reason=reason)
        return True

    def note(self, event: str, **fields: Any) -> None:
        """One entry of the audit log of moves."""
        entry = json.dumps({"unix_s": round(time.time(), 3), "event": event, **fields})
        with named_errors(), self._client.pipeline() as pipe:
            pipe.rpush(_AUDIT, entry)
            pipe.ltrim(_AUDIT, -_MAX_AUDIT_ENTRIES, -1)
            pipe.execute()

    def audit(self) -> list[dict[str, Any]]:
        """Who moved which channel, when and why, oldest first."""
        with named_errors():
            return [json.loads(entry) for entry in cast("list[bytes]", self._client.lrange(_AUDIT, 0, -1))]

    def service_key(self) -> bytes:
        """The secret that all replicas on this registry share, made by the first one that asks."""
        with named_errors():
            self._client.set("{registry}:service-key", os.urandom(32), nx=True)
            key = cast("bytes | None", self._client.get("{registry}:service-key"))
        if key is None:
            raise NotFound("the registry's Redis lost the service key at once; is it evicting keys?")
        return key

    def close(self) -> None:
        self._client.close()


def _plan(name: str) -> str:
    return f"{{registry}}:canary:{name}"


def _tally(plan: CanaryPlan) -> str:
    return f"{{registry}}:tally:{plan.plan_id}"


def _counted(plan: CanaryPlan) -> str:
    return f"{{registry}}:counted:{plan.plan_id}"
