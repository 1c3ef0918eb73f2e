"""What a campaign has and who works on the rest, in Redis: the same for every server of the fleet, after any crash.

Keys, all under one hash tag: ``{campaign:NAME}:episodes`` (hash, episode -> JSON of an Entry), ``...:leases`` (hash,
lease -> JSON), ``...:counts`` (hash, of each quota what counts and what was tried) and ``...:robots`` (hash, robot ->
JSON). A change of several is one transaction; the clock is the server's.
"""

import json
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

from redis.client import Pipeline

from vla_dist.collection.campaign import Campaign, Quota
from vla_dist.core.errors import Unauthorised
from vla_dist.core.seeding import training_seed
from vla_dist.core.types import Source
from vla_dist.protocol.fleet_records import Assignment, EpisodeRecord, Intervention, NextTask, RobotClaim
from vla_dist.protocol.records import FleetCommand
from vla_dist.registry.connection import connect, named_errors

_SOCKET_TIMEOUT_S = 5.0
_CLAIM_S = 15.0
"""A robot that is silent for so long has left its identity to another."""
_WAIT_S = 1.0
_SEED_LANES = 1024

Verdict = Literal["accepted", "surplus", "rejected"]
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One whole episode as the ledger holds it."""

    record: EpisodeRecord
    verdict: Verdict
    """``surplus``: good, and the quota was full already."""
    quota: int
    """Index; -1: none that it could count for."""
    reason: str
    """Why it was rejected."""
    committed_unix_s: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes | str) -> "Entry":
        fields = json.loads(text)
        record = fields.pop("record")
        record["interventions"] = tuple(Intervention(**one) for one in record["interventions"])
        for name in ("notes", "problems"):
            record[name] = tuple(record[name])
        return cls(record=EpisodeRecord(**record), **fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class RobotState:
    """One robot as it was last heard of."""

    robot_id: str
    spool_id: str
    host: str
    seen_unix_s: float
    counters: Mapping[str, float]
    is_drained: bool = False
    """Whether it was told that there is nothing more for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaState:
    """How far one quota is."""

    quota: Quota
    accepted: int
    attempts: int
    """Episodes recorded for it, whatever became of them."""
    leased: int
    """Under way now."""
    last_rejection: str = ""
    """Why the last one that did not count did not."""

    @property
    def is_met(self) -> bool:
        return self.accepted >= self.quota.episodes

    @property
    def is_given_up(self) -> bool:
        return not self.is_met and self.attempts >= self.quota.most_attempts

    @property
    def is_over(self) -> bool:
        return self.is_met or self.is_given_up


@dataclass(frozen=True, slots=True, kw_only=True)
class CampaignState:
    """All of a campaign at one moment."""

    quotas: tuple[QuotaState, ...]
    robots: tuple[RobotState, ...]
    now_unix_s: float
    """By the server's clock."""

    @property
    def is_over(self) -> bool:
        return all(one.is_over for one in self.quotas)


class CampaignLedger:
    """Implements ``serving.ingest.Ledger``; construct one in each process, threads may share it."""

    def __init__(self, url: str, campaign: Campaign) -> None:
        self._client = connect(url, socket_timeout_s=_SOCKET_TIMEOUT_S)
        self._campaign = campaign
        prefix = f"{{campaign:{campaign.name}}}"
        self._episodes, self._leases = f"{prefix}:episodes", f"{prefix}:leases"
        self._counts, self._robots = f"{prefix}:counts", f"{prefix}:robots"

    def claim(self, claim: RobotClaim) -> None:
        """Raises Unauthorised where another spool goes by this robot's name now."""
        self._see(claim, None)

    def next_task(self, claim: RobotClaim, *, tasks: Collection[str], sources: Collection[Source]) -> NextTask:
        """An episode to record, for the quota that is furthest behind among those this robot can work on."""
        self._see(claim, None, is_asking=True)
        answer = self._together(lambda pipe: self._assign(pipe, claim, tasks, sources))
        if answer.command == "drain":
            self._see(claim, None, is_drained=True)
        return answer

    def heartbeat(
        self, claim: RobotClaim, counters: Mapping[str, float], *, lease_id: str, returned_lease_id: str = ""
    ) -> FleetCommand:
        """Renew one lease and end another; ``drain`` once the campaign is over."""
        is_over = self.state().is_over
        self._see(claim, counters, is_drained=is_over)
        if lease_id:
            self._together(lambda pipe: self._renew(pipe, lease_id))
        if returned_lease_id:
            self._together(lambda pipe: self._take_back(pipe, returned_lease_id, claim))
        return "drain" if is_over else "continue"

    def commit(self, record: EpisodeRecord) -> None:
        """Write a whole episode down, once, and count it where it counts."""
        self._together(lambda pipe: self._commit(pipe, record))

    def state(self) -> CampaignState:
        """Raises Unreachable."""
        with self._errors():
            pipe = self._client.pipeline(transaction=True)
            pipe.hgetall(self._leases)
            pipe.hgetall(self._counts)
            pipe.hgetall(self._robots)
            pipe.time()
            leases, counts, robots, clock = pipe.execute()
        now = _seconds(clock)
        return CampaignState(
            quotas=self._quota_states(_alive(leases, now), counts),
            robots=tuple(
                sorted((RobotState(**json.loads(one)) for one in robots.values()), key=lambda one: one.robot_id)
            ),
            now_unix_s=now,
        )

    def entries(self) -> list[Entry]:
        """Every whole episode, in the order they were committed. Raises Unreachable."""
        with self._errors():
            found = self._client.hgetall(self._episodes)
        entries = [Entry.from_json(one) for one in found.values()]  # type: ignore[union-attr]
        return sorted(entries, key=lambda one: (one.committed_unix_s, one.record.episode_id))

    def close(self) -> None:
        self._client.close()

    def _see(
        self,
        claim: RobotClaim,
        counters: Mapping[str, float] | None,
        *,
        is_drained: bool = False,
        is_asking: bool = False,
    ) -> None:
        def see(pipe: Pipeline) -> None:
            known = pipe.hget(self._robots, claim.robot_id)
            now = _seconds(pipe.time())
            before = None if known is None else RobotState(**json.loads(known))  # type: ignore[arg-type]
            if before and before.spool_id != claim.spool_id and now - before.seen_unix_s < _CLAIM_S:
                raise Unauthorised(
                    f"robot id {claim.robot_id!r} is in use by a robot on {before.host or 'another machine'}, heard of "
                    f"{now - before.seen_unix_s:.0f} s ago; give this one (on {claim.host}) a name of its own"
                )
            kept = dict(counters) if counters is not None else dict(before.counters) if before else {}
            state = RobotState(
                robot_id=claim.robot_id,
                spool_id=claim.spool_id,
                host=claim.host,
                seen_unix_s=now,
                counters=kept,
                is_drained=is_drained or (before is not None and before.is_drained and not is_asking),
            )
            pipe.multi()
            pipe.hset(self._robots, claim.robot_id, json.dumps(asdict(state)))

        self._together(see, keys=(self._robots,))

    def _assign(
        self, pipe: Pipeline, claim: RobotClaim, tasks: Collection[str], sources: Collection[Source]
    ) -> NextTask:
        leases, counts, now = self._read(pipe)
        alive = _alive(leases, now)
        states = self._quota_states(alive, counts)
        possible = [
            (index, state)
            for index, state in enumerate(states)
            if not state.is_over
            and self._campaign.allows(state.quota, claim.robot_id)
            and (not tasks or state.quota.task in tasks)
            and (not sources or state.quota.source in sources)
        ]
        free = [(i, s) for i, s in possible if s.accepted + s.leased < s.quota.episodes]
        pipe.multi()
        expired = [lease for lease in leases if lease not in alive]
        if expired:
            pipe.hdel(self._leases, *expired)
        if not possible:
            over = all(state.is_over for state in states)
            reason = "the campaign is over" if over else f"nothing is left that {claim.robot_id!r} can do"
            return NextTask(command="drain", reason=reason)
        if not free:
            return NextTask(command="continue", wait_s=_WAIT_S, reason="others work on all that is left")
        index, state = min(free, key=lambda one: (one[1].accepted + one[1].leased) / one[1].quota.episodes)
        number = int(counts.get(f"{index}:given".encode(), 0))
        assignment = Assignment(
            lease_id=f"{index}-{uuid.uuid4().hex[:16]}",
            task=state.quota.task,
            source=state.quota.source,
            instruction=state.quota.instruction,
            policy=state.quota.policy,
            seed=training_seed(self._campaign.seed, index % _SEED_LANES, number),
            lease_s=self._campaign.lease_s,
        )
        lease = {"quota": index, "robot": claim.robot_id, "until": now + self._campaign.lease_s}
        pipe.hset(self._leases, assignment.lease_id, json.dumps(lease))
        pipe.hincrby(self._counts, f"{index}:given", 1)
        return NextTask(command="continue", assignment=assignment)

    def _renew(self, pipe: Pipeline, lease_id: str) -> None:
        leases, _, now = self._read(pipe)
        held = leases.get(lease_id.encode())
        pipe.multi()
        if held is not None:
            pipe.hset(self._leases, lease_id, json.dumps({**json.loads(held), "until": now + self._campaign.lease_s}))

    def _take_back(self, pipe: Pipeline, lease_id: str, claim: RobotClaim) -> None:
        """Only from the robot that holds it."""
        held = self._read(pipe)[0].get(lease_id.encode())
        pipe.multi()
        if held is not None and json.loads(held)["robot"] == claim.robot_id:
            pipe.hdel(self._leases, lease_id)

    def _commit(self, pipe: Pipeline, record: EpisodeRecord) -> None:
        if pipe.hexists(self._episodes, record.episode_id):
            pipe.multi()
            return
        _, counts, now = self._read(pipe)
        index = self._quota_of(record, counts)
        verdict, reason = self._judge(record, index, counts)
        entry = Entry(record=record, verdict=verdict, quota=index, reason=reason, committed_unix_s=now)
        pipe.multi()
        pipe.hset(self._episodes, record.episode_id, entry.to_json())
        if record.lease_id:
            pipe.hdel(self._leases, record.lease_id)
        if index >= 0:
            pipe.hincrby(self._counts, f"{index}:attempts", 1)
        if verdict == "accepted":
            pipe.hincrby(self._counts, f"{index}:accepted", 1)
        elif reason:
            pipe.hset(self._counts, f"{index}:rejection", reason)

    def _quota_of(self, record: EpisodeRecord, counts: Mapping[bytes, bytes]) -> int:
        """By the lease it was recorded for, or else the first unmet one that it fits."""
        named = record.lease_id.partition("-")[0]
        if named.isdigit() and int(named) < len(self._campaign.quotas):
            return int(named)
        fitting = [
            index
            for index, quota in enumerate(self._campaign.quotas)
            if (quota.task, quota.source) == (record.task, record.source)
            and self._campaign.allows(quota, record.robot_id)
        ]
        wanted = [i for i in fitting if self._campaign.quotas[i].success in (None, record.success)]
        unmet = [i for i in wanted if int(counts.get(f"{i}:accepted".encode(), 0)) < self._campaign.quotas[i].episodes]
        return (unmet or wanted or fitting or [-1])[0]

    def _judge(self, record: EpisodeRecord, index: int, counts: Mapping[bytes, bytes]) -> tuple[Verdict, str]:
        if index < 0:
            return "rejected", f"no quota asks for {record.task!r} by {record.source} from {record.robot_id!r}"
        quota = self._campaign.quotas[index]
        if (record.task, record.source) != (quota.task, quota.source):
            return "rejected", f"recorded {record.task!r} by {record.source}, leased {quota.task!r} by {quota.source}"
        if not self._campaign.allows(quota, record.robot_id):
            return "rejected", f"robot {record.robot_id!r} is none of {', '.join(quota.robots)}"
        if record.partial and not quota.accept_partial:
            return "rejected", f"partial: {record.partial}"
        if quota.success is not None and record.success != quota.success:
            return "rejected", "a failure" if quota.success else "a success"
        if record.problems and not quota.accept_problems:
            return "rejected", "; ".join(record.problems)
        if int(counts.get(f"{index}:accepted".encode(), 0)) >= quota.episodes:
            return "surplus", ""
        return "accepted", ""

    def _quota_states(
        self, leases: Mapping[bytes, Mapping[str, Any]], counts: Mapping[bytes, bytes]
    ) -> tuple[QuotaState, ...]:
        leased = [one["quota"] for one in leases.values()]
        return tuple(
            QuotaState(
                quota=quota,
                accepted=int(counts.get(f"{index}:accepted".encode(), 0)),
                attempts=int(counts.get(f"{index}:attempts".encode(), 0)),
                leased=leased.count(index),
                last_rejection=counts.get(f"{index}:rejection".encode(), b"").decode(),
            )
            for index, quota in enumerate(self._campaign.quotas)
        )

    def _read(self, pipe: Pipeline) -> tuple[dict[bytes, bytes], dict[bytes, bytes], float]:
        """Leases, counts and the time; with a watched pipeline each command is answered at once."""
        return pipe.hgetall(self._leases), pipe.hgetall(self._counts), _seconds(pipe.time())  # type: ignore[return-value]

    def _together(self, change: Callable[[Pipeline], R], *, keys: tuple[str, ...] = ()) -> R:
        """Run ``change`` until nobody came between its reads and its writes."""
        watched = keys or (self._episodes, self._leases, self._counts)
        with self._errors():
            return self._client.transaction(change, *watched, value_from_callable=True)  # type: ignore[return-value]

    @contextmanager
    def _errors(self) -> Iterator[None]:
        with named_errors("the campaign's Redis"):
            yield


def _alive(leases: Mapping[bytes, bytes], now: float) -> dict[bytes, dict[str, Any]]:
    parsed = {name: json.loads(one) for name, one in leases.items()}
    return {name: one for name, one in parsed.items() if one["until"] > now}


def _seconds(clock: Any) -> float:
    return float(clock[0]) + float(clock[1]) / 1e6
