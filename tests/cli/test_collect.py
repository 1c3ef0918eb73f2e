"""What a person watches while a campaign runs."""

import io

from rich.console import Console

from vla_dist.cli.collect import draw_status
from vla_dist.collection.campaign import Quota
from vla_dist.collection.ledger import CampaignState, QuotaState, RobotState
from vla_dist.run.collect import CampaignStatus


def robot(name: str, *, seen_unix_s: float = 99.0, **counters: float) -> RobotState:
    return RobotState(robot_id=name, spool_id="s", host="here", seen_unix_s=seen_unix_s, counters=counters)


def test_bars_by_task_and_by_robot() -> None:
    quota = Quota(task="open", episodes=10, source="expert")
    state = CampaignState(
        quotas=(QuotaState(quota=quota, accepted=4, attempts=5, leased=1, last_rejection="a failure"),),
        robots=(
            robot("arm-1", episodes=4.0, successes=4.0),
            robot("arm-2", episodes=1.0, faults=3.0, waiting_segments=2.0, seen_unix_s=10.0),
        ),
        now_unix_s=100.0,
    )
    status = CampaignStatus(
        state=state, address="here:9010", phase="collecting", elapsed_s=3, archived=4, quarantined=1, redis_deaths=2
    )
    console = Console(width=160, file=io.StringIO(), color_system=None)
    with console.capture() as shown:
        console.print(draw_status(status))
    text = shown.get()
    assert "1 segments quarantined, Redis started again 2 times" in text
    (task,) = [line for line in text.splitlines() if line.startswith("open")]
    assert "4/10 1 under way, 5 recorded, 1 did not count: a failure" in task
    first, second = [line for line in text.splitlines() if line.startswith("arm-")]
    assert first.count("━") == 20, "the most: a whole bar"
    assert second.count("━") == 5
    assert second.split()[-6:] == ["0", "3", "2", "90", "s", "ago"]
