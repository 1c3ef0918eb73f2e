"""The plan's arithmetic on measured rates, and what it refuses."""

import dataclasses
import json
from pathlib import Path

import pytest

from vla_dist.core.errors import ConfigError, NotFound
from vla_dist.run.cluster_file import read_cluster_file
from vla_dist.run.plan import COSTS, PartCosts, load_costs, make_plan
from vla_dist.run.presets import preset

ROOT = Path(__file__).parents[2]
COST = PartCosts(
    preset="demo",
    machine="a machine",
    command="a command",
    rollout_steps_per_s=100.0,
    replay_insert_steps_per_s=10_000.0,
    replay_sample_windows_per_s=20_000.0,
    learner_updates_per_s={"cpu": 10.0, "H100": 200.0},
    replica_calls_per_s=500.0,
)


def plan(*, costs=COST, robots=0, name="ray_cluster.yaml", **changes):
    config = preset("demo")
    for part, values in changes.items():
        config = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **values)})
    return make_plan(read_cluster_file(ROOT / name), config, costs, num_robots=robots)


def test_two_workers_hold_a_fast_learner_back_and_many_do_not():
    # 2 x 100 steps and 4 robots x 20 Hz a second, 4 windows each; 64 windows an update.
    slow = plan(learner={"use_gpu": True})
    assert slow.stages[0].name == "rollouts and robots"
    assert slow.collect_steps_per_s == pytest.approx(280)
    assert slow.updates_per_s == pytest.approx(280 * 4 / 64)
    fast = plan(learner={"use_gpu": True}, rollout={"num_workers": 100})
    assert fast.stages[0].name == "learner (H100)"
    assert fast.updates_per_s == pytest.approx(200)
    assert fast.hours == pytest.approx(2000 / 200 / 3600)
    assert fast.stages[0].load == pytest.approx(1)
    assert all(stage.load <= 1 for stage in fast.stages)


def test_a_cpu_learner_and_a_small_replay_are_found():
    assert plan(rollout={"num_workers": 100}).stages[0].name == "learner (cpu)"
    small = dataclasses.replace(COST, replay_sample_windows_per_s=100.0)
    assert plan(costs=small).stages[0].name == "replay, samples"


def test_parts_lie_where_their_role_is_and_fill_nodes():
    placed = {one.part.name: one for one in plan(rollout={"num_workers": 40}, serving={"num_replicas": 5}).placed}
    assert (placed["rollout workers"].group, placed["rollout workers"].nodes) == ("rollout", 3)
    assert (placed["serving replicas"].group, placed["serving replicas"].nodes) == ("serving", 2)
    assert (placed["learner ranks"].group, placed["learner ranks"].nodes) == ("learner", 1)


def test_more_robots_than_replicas_answer_are_said():
    (note, _) = plan(robots=100).notes
    assert "robots ask 2080 times a second and the replicas answer 500 at most" in note


def test_prices_come_from_the_file():
    # Workers and simulated robots share one spot node.
    document = read_cluster_file(ROOT / "ray_cluster.yaml").document["metadata"]["usd_per_hour"]
    assert plan().usd_per_hour == pytest.approx(sum(document.values()))
    more = plan(rollout={"num_workers": 16}).usd_per_hour
    assert more == pytest.approx(sum(document.values()) + document["rollout"])
    assert plan(name="cluster/onprem.yaml").usd_per_hour is None


def test_what_was_not_measured_is_refused(tmp_path):
    cpu_only = dataclasses.replace(COST, learner_updates_per_s={"cpu": 1.0})
    with pytest.raises(ConfigError, match="no GPU was measured for 'demo'; run 'vla-dist bench parts demo"):
        plan(costs=cpu_only, learner={"use_gpu": True})
    path = tmp_path / "costs.json"
    path.write_text(json.dumps([dataclasses.asdict(COST)]))
    assert load_costs("demo", path) == COST
    with pytest.raises(NotFound, match=r"'babyai' was not measured, costs\.json has demo"):
        load_costs("babyai", path)
    path.write_text("{")
    with pytest.raises(ConfigError, match="does not hold measured costs"):
        load_costs("demo", path)
    with pytest.raises(ConfigError, match="must be positive"):
        dataclasses.replace(COST, rollout_steps_per_s=0.0)


def test_measured_costs_are_shipped():
    for name in ("demo", "babyai"):
        costs = load_costs(name, COSTS)
        assert costs.command.startswith(f"vla-dist bench parts {name}")
