"""What counts, counts once; no two robots do the same work; an identity belongs to one robot."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from vla_dist.collection.campaign import Campaign, Quota
from vla_dist.collection.ledger import CampaignLedger
from vla_dist.core.errors import Unauthorised, Unreachable
from vla_dist.protocol.fleet_records import EpisodeRecord, Intervention, RobotClaim

_names = (f"campaign-{number}" for number in itertools.count())
ARM = RobotClaim(robot_id="arm-1", spool_id="spool-1", host="here")
OTHER = RobotClaim(robot_id="arm-2", spool_id="spool-2", host="there")
MakeLedger = Callable[..., CampaignLedger]


@pytest.fixture
def make_ledger(redis_url: str) -> Iterator[MakeLedger]:
    opened: list[CampaignLedger] = []

    def make(*quotas: Quota, name: str | None = None, **settings: object) -> CampaignLedger:
        campaign = Campaign(name=name or next(_names), environment="t-maze", quotas=quotas, **settings)  # type: ignore[arg-type]
        opened.append(CampaignLedger(redis_url, campaign))
        return opened[-1]

    yield make
    for ledger in opened:
        ledger.close()


def quota(task: str = "open", **settings: object) -> Quota:
    return Quota(**{"task": task, "episodes": 2, "source": "expert", **settings})  # type: ignore[arg-type]


def record(episode_id: str, **settings: object) -> EpisodeRecord:
    fields = {
        "episode_id": episode_id,
        "robot_id": "arm-1",
        "task": "open",
        "source": "expert",
        "num_steps": 10,
        "num_segments": 2,
        "success": True,
    }
    return EpisodeRecord(**{**fields, **settings})  # type: ignore[arg-type]


def ask(ledger: CampaignLedger, claim: RobotClaim = ARM, tasks: tuple[str, ...] = ()):  # type: ignore[no-untyped-def]
    return ledger.next_task(claim, tasks=tasks, sources=())


def test_an_episode_counts_once(make_ledger: MakeLedger) -> None:
    ledger = make_ledger(quota())
    taken = Intervention(operator="anna", first_step=2, end_step=5)
    first = record("e0", interventions=(taken,), notes=("sticky",))
    for one in (first, first, record("e1"), record("e2")):
        ledger.commit(one)
    state = ledger.state()
    assert (state.quotas[0].accepted, state.quotas[0].attempts, state.is_over) == (2, 3, True)
    entries = ledger.entries()
    assert [entry.verdict for entry in entries] == ["accepted", "accepted", "surplus"]
    assert entries[0].record == first


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"success": False}, "a failure"),
        ({"partial": "camera gone"}, "partial: camera gone"),
        ({"problems": ("recorded at 5.0 steps/s",)}, "5.0 steps/s"),
        ({"task": "opne"}, "no quota asks for 'opne'"),
        ({"robot_id": "stranger"}, "no quota asks"),
    ],
)
def test_what_does_not_count_says_why(make_ledger: MakeLedger, settings: dict, reason: str) -> None:
    ledger = make_ledger(quota(robots=("arm-*",), success=True))
    ledger.commit(record("e", **settings))
    (entry,) = ledger.entries()
    assert (entry.verdict, reason in entry.reason) == ("rejected", True), entry.reason
    assert ledger.state().quotas[0].accepted == 0


def test_no_more_is_given_out_than_is_wanted(make_ledger: MakeLedger) -> None:
    ledger = make_ledger(quota(episodes=2))
    first, second = ask(ledger).assignment, ask(ledger, OTHER).assignment
    assert first.task == "open"
    assert first.seed != second.seed
    third = ask(ledger)
    assert (third.command, third.assignment, third.wait_s > 0) == ("continue", None, True)
    ledger.commit(record("e0", lease_id=first.lease_id, success=False))
    again = ask(ledger).assignment
    assert again is not None
    ledger.commit(record("e1", lease_id=second.lease_id, robot_id="arm-2"))
    ledger.commit(record("e2", lease_id=again.lease_id))
    assert ask(ledger).command == "drain"
    assert ledger.heartbeat(ARM, {}, lease_id="") == "drain"


def test_what_is_furthest_behind_comes_first(make_ledger: MakeLedger) -> None:
    ledger = make_ledger(quota("open", episodes=4), quota("close", episodes=2))
    tasks = [ask(ledger).assignment.task for _ in range(6)]
    assert sorted(tasks) == ["close"] * 2 + ["open"] * 4
    assert tasks[:2] == ["open", "close"]


def test_a_robot_gets_only_what_it_can_do(make_ledger: MakeLedger) -> None:
    ledger = make_ledger(quota("open", robots=("arm-2",)), quota("close"))
    assert ask(ledger).assignment.task == "close"
    assert ask(ledger, tasks=("open",)).command == "drain"
    assert ask(ledger, OTHER, tasks=("open",)).assignment.task == "open"


def test_a_silent_robot_gives_its_work_to_another(make_ledger: MakeLedger) -> None:
    ledger = make_ledger(quota(episodes=1), lease_s=0.3)
    lost = ask(ledger).assignment
    assert ask(ledger, OTHER).assignment is None
    for _ in range(3):
        time.sleep(0.15)
        ledger.heartbeat(ARM, {"steps": 3.0}, lease_id=lost.lease_id)
    assert ask(ledger, OTHER).assignment is None, "a lease that is renewed holds"
    time.sleep(0.35)
    assert ask(ledger, OTHER).assignment is not None
    # The first one was only late: what it recorded counts all the same.
    ledger.commit(record("late", lease_id=lost.lease_id))
    assert ledger.state().quotas[0].accepted == 1


def test_a_robot_that_recorded_nothing_gives_its_work_back_at_once(make_ledger: MakeLedger) -> None:
    ledger = make_ledger(quota(episodes=1), lease_s=60.0)
    given = ask(ledger).assignment
    ledger.heartbeat(OTHER, {}, lease_id="", returned_lease_id=given.lease_id)
    assert ask(ledger, OTHER).assignment is None, "only who holds a lease may give it back"
    ledger.heartbeat(ARM, {}, lease_id="", returned_lease_id=given.lease_id)
    assert ask(ledger, OTHER).assignment is not None


def test_a_quota_that_cannot_be_met_is_given_up(make_ledger: MakeLedger) -> None:
    ledger = make_ledger(quota(episodes=1, max_attempts=3))
    for number in range(3):
        ledger.commit(record(f"e{number}", success=False))
    state = ledger.state()
    assert (state.quotas[0].is_given_up, state.is_over) == (True, True)
    assert ask(ledger).command == "drain"


def test_two_robots_of_one_name_are_told_apart(make_ledger: MakeLedger) -> None:
    ledger = make_ledger(quota())
    ledger.claim(ARM)
    ledger.claim(ARM)
    with pytest.raises(Unauthorised, match="'arm-1' is in use by a robot on here"):
        ledger.claim(replace(ARM, spool_id="another", host="elsewhere"))
    assert [robot.spool_id for robot in ledger.state().robots] == ["spool-1"]


def test_many_at_once_are_given_and_counted_exactly(make_ledger: MakeLedger, redis_url: str) -> None:
    name = next(_names)
    quotas = (quota("open", episodes=15), quota("close", episodes=10))

    def work(robot: int) -> None:
        ledger = make_ledger(*quotas, name=name)
        claim = RobotClaim(robot_id=f"arm-{robot}", spool_id=str(robot))
        for number in range(20):
            answer = ask(ledger, claim)
            if answer.assignment is not None:
                given = answer.assignment
                ledger.commit(
                    record(f"{robot}-{number}", robot_id=claim.robot_id, task=given.task, lease_id=given.lease_id)
                )

    threads = [threading.Thread(target=work, args=(robot,)) for robot in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    ledger = make_ledger(*quotas, name=name)
    assert [one.accepted for one in ledger.state().quotas] == [15, 10]
    assert [entry.verdict for entry in ledger.entries()].count("surplus") == 0
    assert len(ledger.entries()) == 25


def test_a_lost_redis_has_a_name() -> None:
    campaign = Campaign(name="x", environment="t-maze", quotas=(quota(),))
    ledger = CampaignLedger("redis://127.0.0.1:1/0", campaign)
    with pytest.raises(Unreachable, match="the campaign's Redis does not answer"):
        ledger.state()
    ledger.close()
