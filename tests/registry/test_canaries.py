"""Plans and tallies of canaries in the registry's Redis."""

from pathlib import Path
from typing import Any

import pytest

from vla_dist.core.errors import ConfigError
from vla_dist.registry.canaries import RedisCanaries
from vla_dist.registry.canary_plan import CanaryPlan, sticky_share
from vla_dist.registry.sequential import CanaryRule, Tally
from vla_dist.replay.server import EmbeddedServer


@pytest.fixture
def canaries(tmp_path: Path) -> Any:
    with EmbeddedServer(tmp_path / "redis") as server:
        store = RedisCanaries(server.url)
        yield store
        store.close()


PLAN = CanaryPlan(name="demo", version=2, incumbent=1, share=0.25, rule=CanaryRule(min_episodes=5))


def test_an_episode_counts_once_and_only_for_the_plan(canaries: RedisCanaries) -> None:
    assert canaries.record("demo", 2, "e0", success=True) is None
    plan = canaries.begin(PLAN, who="me")
    for _ in range(3):
        canaries.record("demo", 2, "e1", success=True)
    canaries.record("demo", 1, "e1", success=False)
    canaries.record("demo", 7, "e2", success=False)
    assert canaries.tallies(plan) == (Tally(successes=1, trials=1), Tally(successes=0, trials=1))
    assert canaries.plan("demo") == plan
    again = canaries.begin(PLAN, who="me")
    assert canaries.tallies(again) == (Tally(), Tally())


def test_a_worse_canary_says_so_and_ends_once(canaries: RedisCanaries) -> None:
    plan = canaries.begin(PLAN, who="me")
    verdicts = []
    for index in range(40):
        canaries.record("demo", 1, f"i{index}", success=True)
        verdicts.append(canaries.record("demo", 2, f"c{index}", success=False))
    last = verdicts[-1]
    assert last is not None
    assert last.decision == "rollback"
    assert canaries.end("demo", "rolled_back", last.reason, who="test", plan_id=plan.plan_id)
    assert not canaries.end("demo", "rolled_back", last.reason, who="test", plan_id=plan.plan_id)
    ended = canaries.plan("demo")
    assert ended is not None
    assert (ended.state, ended.is_running) == ("rolled_back", False)
    assert [entry["event"] for entry in canaries.audit()] == ["canary", "rolled_back"]


def test_robots_stick_to_their_channel_and_a_larger_share_only_adds() -> None:
    robots = [f"arm-{index}" for index in range(2000)]
    taken = {robot for robot in robots if PLAN.takes(robot)}
    assert abs(len(taken) / len(robots) - 0.25) < 0.04
    more = CanaryPlan(name="demo", version=3, incumbent=1, share=0.5)
    assert taken < {robot for robot in robots if more.takes(robot)}
    assert 0 <= sticky_share("x") < 1
    with pytest.raises(ConfigError, match="incumbent itself"):
        CanaryPlan(name="demo", version=1, incumbent=1, share=0.5)
    with pytest.raises(ConfigError, match="share"):
        CanaryPlan(name="demo", version=2, incumbent=1, share=0.0)


def test_all_replicas_get_one_key(canaries: RedisCanaries) -> None:
    key = canaries.service_key()
    assert len(key) == 32
    assert canaries.service_key() == key
