import itertools

import numpy as np
import pytest
import torch

from vla_dist.core.errors import ConfigError
from vla_dist.models.analysis.costs import measure_costs, parameters_by_module
from vla_dist.models.analysis.figure import draw_costs
from vla_dist.models.analysis.subjects import subject
from vla_dist.models.analysis.verdict import judge
from vla_dist.models.zoo import ARCHITECTURES, architecture


def ticking(step=0.002):
    """A clock of which every reading is one step later, so that all that is timed takes one step."""
    count = itertools.count()
    return lambda: next(count) * step


@pytest.fixture
def tiny():
    return subject(architecture("decision_transformer"), "tiny")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_member_can_be_measured(name):
    one = subject(ARCHITECTURES[name], "tiny")
    costs = measure_costs(one, clock=ticking(), num_acts=7, batches=(1, 3))
    assert costs.name == f"{name}/tiny"
    assert sum(costs.parameters_by_module.values()) == costs.num_parameters
    assert costs.weight_bytes >= 4 * costs.num_trainable > 0
    assert costs.training_flops > 2 * costs.training_forward_flops > 0
    assert min(costs.act_flops, costs.activation_bytes, costs.state_bytes) > 0
    assert (costs.context_steps, costs.horizon) == (one.config.context_steps, one.config.horizon)


@pytest.mark.parametrize("planner", ["reactive", "sketch"])
def test_a_hierarchy_of_named_skills_can_be_measured(planner):
    skills = {"skills": ["open", "close"], "learned_termination": True}
    one = subject(architecture("hierarchical"), "tiny", planner=planner, goal_clauses=2, goal_dim=768, **skills)
    costs = measure_costs(one, clock=ticking(), num_acts=7, batches=(1,))
    assert costs.act_flops_closed_form == pytest.approx(costs.act_flops, rel=0.01)
    assert costs.training_forward_flops_closed_form == pytest.approx(costs.training_forward_flops, rel=0.01)
    assert "terminate" in costs.parameters_by_module


def test_times_are_those_of_the_clock(tiny):
    costs = measure_costs(tiny, clock=ticking(0.002), num_acts=9, batches=(1, 4))
    assert costs.latency_ms == pytest.approx({"p50": 2.0, "p95": 2.0, "p99": 2.0, "num": 9})
    assert costs.acts_per_s == pytest.approx({1: 500.0, 4: 2000.0})


def test_a_slow_policy_is_timed_as_long_as_the_budget_lasts(tiny):
    costs = measure_costs(tiny, clock=ticking(1.0), budget_s=20.0, num_acts=1000, batches=(1,))
    assert 5 <= costs.latency_ms["num"] <= 10


def test_state_and_activation_bytes_are_those_of_the_arrays(tiny):
    one = subject(architecture("decision_transformer"), "gym")
    costs = measure_costs(one, clock=ticking(), num_acts=5, batches=(1,))
    steps, spec = one.config.context_steps, one.spec
    assert costs.state_bytes == 4 * steps * (spec.proprio_dim + spec.action_dim + 1)
    longer = subject(architecture("decision_transformer"), "tiny", context_steps=10)
    short, long = (measure_costs(s, clock=ticking(), num_acts=5, batches=(1,)) for s in (tiny, longer))
    assert 1.6 < long.activation_bytes / short.activation_bytes < 2.6


def test_shared_parameters_count_once():
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
    module["b"].weight = module["a"].weight
    assert parameters_by_module(module) == {"a": 12, "b": 3}


def test_a_fast_policy_waits_for_each_action():
    verdict = judge(p99_ms=15, horizon=1, control_hz=50, network_ms=5)
    assert verdict.keeps_up_synchronously
    assert verdict.synchronous_hz == pytest.approx(50)
    assert verdict.delay_steps == 1
    assert "50 Hz" in verdict.sentence


@pytest.mark.parametrize(
    ("p99", "horizon", "delay", "execute"),
    [(95, 10, 5, (5, 5)), (96, 10, 6, None), (15, 10, 1, (1, 9)), (35, 10, 2, (2, 8)), (35, 3, 2, None)],
)
def test_a_slow_policy_needs_chunks_that_cover_its_delay_twice(p99, horizon, delay, execute):
    verdict = judge(p99_ms=p99, horizon=horizon, control_hz=50, network_ms=5)
    assert (verdict.delay_steps, verdict.execute_steps) == (delay, execute)
    if not verdict.keeps_up_synchronously:
        assert ("too slow" in verdict.sentence) == (execute is None)


def test_rates_that_mean_nothing_are_refused():
    for wrong in ({"control_hz": 0.0}, {"p99_ms": 0.0}, {"network_ms": -1.0}, {"horizon": 0}):
        with pytest.raises(ConfigError, match="must be positive"):
            judge(**{"p99_ms": 1.0, "horizon": 1, "control_hz": 10.0, **wrong})


def test_the_picture_shows_every_member(tiny, tmp_path):
    from PIL import Image

    costs = measure_costs(tiny, clock=ticking(), num_acts=5, batches=(1, 2))
    draw_costs([costs, costs], tmp_path / "costs.png", verdict=judge(p99_ms=5, horizon=1, control_hz=20))
    picture = np.asarray(Image.open(tmp_path / "costs.png").convert("RGB"))
    assert picture.shape[0] > 500
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
