"""Plans, tallies and verdicts of canaries to protobuf messages and back."""

import math
from collections.abc import Mapping
from typing import Any

from vla_dist.core.errors import DataError
from vla_dist.protocol.v1 import channels_pb2
from vla_dist.registry.canary_plan import CanaryPlan, PlanState
from vla_dist.registry.channel_moves import ChannelReport
from vla_dist.registry.sequential import CanaryRule, Decision, Tally, Verdict

_STATES: Mapping[PlanState, channels_pb2.CanaryState] = {
    "running": channels_pb2.CANARY_STATE_RUNNING,
    "promoted": channels_pb2.CANARY_STATE_PROMOTED,
    "rolled_back": channels_pb2.CANARY_STATE_ROLLED_BACK,
}
_DECISIONS: Mapping[Decision, channels_pb2.CanaryDecision] = {
    "continue": channels_pb2.CANARY_DECISION_CONTINUE,
    "promote": channels_pb2.CANARY_DECISION_PROMOTE,
    "rollback": channels_pb2.CANARY_DECISION_ROLLBACK,
}
_STATES_BACK: dict[int, PlanState] = {number: name for name, number in _STATES.items()}
_DECISIONS_BACK: dict[int, Decision] = {number: name for name, number in _DECISIONS.items()}


def encode_rule(rule: CanaryRule) -> channels_pb2.CanaryRule:
    return channels_pb2.CanaryRule(margin=rule.margin, confidence=rule.confidence, min_episodes=rule.min_episodes)


def decode_rule(message: channels_pb2.CanaryRule) -> CanaryRule:
    """Raises DataError on numbers that are none, ConfigError on numbers that make no rule."""
    if not (math.isfinite(message.margin) and math.isfinite(message.confidence)):
        raise DataError(f"margin {message.margin} and confidence {message.confidence} must be numbers")
    return CanaryRule(margin=message.margin, confidence=message.confidence, min_episodes=message.min_episodes)


def encode_plan(plan: CanaryPlan) -> channels_pb2.CanaryPlan:
    return channels_pb2.CanaryPlan(
        name=plan.name,
        version=plan.version,
        incumbent=plan.incumbent,
        share=plan.share,
        rule=encode_rule(plan.rule),
        plan_id=plan.plan_id,
        state=_STATES[plan.state],
        reason=plan.reason,
        started_unix_s=plan.started_unix_s,
    )


def decode_plan(message: channels_pb2.CanaryPlan) -> CanaryPlan:
    return CanaryPlan(
        name=message.name,
        version=message.version,
        incumbent=message.incumbent,
        share=message.share,
        rule=decode_rule(message.rule),
        plan_id=message.plan_id,
        state=_known(_STATES_BACK, message.state),
        reason=message.reason,
        started_unix_s=message.started_unix_s,
    )


def encode_report(report: ChannelReport) -> channels_pb2.ChannelReport:
    return channels_pb2.ChannelReport(
        name=report.name,
        channels=report.channels,
        plan=None if report.plan is None else encode_plan(report.plan),
        canary=_encode_tally(report.canary),
        incumbent=_encode_tally(report.incumbent),
        verdict=None
        if report.verdict is None
        else channels_pb2.CanaryVerdict(decision=_DECISIONS[report.verdict.decision], reason=report.verdict.reason),
    )


def decode_report(message: channels_pb2.ChannelReport) -> ChannelReport:
    verdict = None
    if message.HasField("verdict"):
        decision = _known(_DECISIONS_BACK, message.verdict.decision)
        verdict = Verdict(decision=decision, reason=message.verdict.reason)
    return ChannelReport(
        name=message.name,
        channels=dict(message.channels),
        plan=decode_plan(message.plan) if message.HasField("plan") else None,
        canary=_decode_tally(message.canary),
        incumbent=_decode_tally(message.incumbent),
        verdict=verdict,
    )


def encode_entry(entry: Mapping[str, Any]) -> channels_pb2.AuditEntry:
    fields = {key: str(value) for key, value in entry.items() if key not in ("unix_s", "event")}
    return channels_pb2.AuditEntry(unix_s=entry["unix_s"], event=entry["event"], fields=fields)


def decode_entry(message: channels_pb2.AuditEntry) -> dict[str, Any]:
    """As the registry keeps it, but every field is a text."""
    return {"unix_s": message.unix_s, "event": message.event, **message.fields}


def _encode_tally(tally: Tally) -> channels_pb2.EpisodeTally:
    return channels_pb2.EpisodeTally(successes=tally.successes, trials=tally.trials)


def _decode_tally(message: channels_pb2.EpisodeTally) -> Tally:
    return Tally(successes=message.successes, trials=message.trials)


def _known(names: Mapping[int, Any], number: int) -> Any:
    if number not in names:
        raise DataError(f"the server sent {number}, expected one of {sorted(names)}; update this client")
    return names[number]
