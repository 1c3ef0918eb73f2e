"""What holds for every algorithm: chosen by name, refused where it does not fit, resumed bit for bit."""

import numpy as np
import pytest
import torch

from vla_dist.core.errors import ConfigError
from vla_dist.learner.algorithms.catalogue import ALGORITHMS, algorithm_for, make_algorithm
from vla_dist.learner.algorithms.interventions import InterventionWeights
from vla_dist.models.hierarchical.config import HierarchicalVLAConfig
from vla_dist.models.hierarchical.hierarchical_vla import HierarchicalVLA
from vla_dist.models.memory.memory_vla import MemoryAugmentedVLA, MemoryAugmentedVLAConfig
from vla_dist.testing.episodes import EpisodeTable

from .conftest import SPEC, make_model, record

SIZES = {"state_dim": 2, "action_dim": 1, "goal_dim": 0}


def make_hierarchical():
    torch.manual_seed(1)
    return HierarchicalVLA(
        HierarchicalVLAConfig(**SIZES, high_level_dim=8, low_level_dim=8, hold_steps=2, context_steps=4)
    )


def make_memory():
    torch.manual_seed(1)
    return MemoryAugmentedVLA(
        MemoryAugmentedVLAConfig(**SIZES, memory_size=4, memory_dim=8, num_heads=2, context_steps=4, burn_in_steps=1)
    )


CASES = {
    "behaviour_cloning": (make_model, "none"),
    "decision_transformer": (make_model, "steps_to_success"),
    "online_decision_transformer": (lambda: make_model(head="gaussian"), "reward"),
    "hierarchical": (make_hierarchical, "none"),
    "memory": (make_memory, "none"),
    "conditioned": (make_model, "advantage"),
}


def test_every_algorithm_is_tested():
    assert CASES.keys() == ALGORITHMS.keys()


def make_table(first_batch=0):
    table = EpisodeTable(SPEC, context_steps=4, future_steps=2, first_batch=first_batch)
    rng = np.random.default_rng(0)
    for number in range(6):
        record(
            table,
            rng.normal(size=(10, 2)),
            rng.uniform(-0.9, 0.9, (10, 1)),
            rewards=rng.normal(size=10),
            success=number % 2 == 0,
            version=number % 3,
            interventions=(np.arange(10) > 6) & (number % 3 == 1),
        )
    return table


@pytest.mark.parametrize("name", CASES)
def test_ten_updates_saved_in_the_middle_and_resumed_are_ten_straight(make_learner, name):
    make, conditioning = CASES[name]
    settings = {
        "updates": 10,
        "batch_size": 8,
        "updates_per_step": 5,
        "algorithm": name,
        "conditioning": conditioning,
        "interventions": InterventionWeights(before_steps=2),
    }
    straight = make_learner(make_table(), make(), **settings)
    while not straight.done:
        straight.step()
    first = make_learner(make_table(), make(), **settings)
    first.step()
    saved = first.checkpoint()
    torch.manual_seed(999)
    second = make_learner(make_table(first_batch=5), make(), **settings)
    second.resume(saved)
    while not second.done:
        second.step()
    expected, resumed = straight.checkpoint(), second.checkpoint()
    assert expected.tensors.keys() == resumed.tensors.keys()
    differing = [n for n, value in expected.tensors.items() if not torch.equal(value, resumed.tensors[n])]
    assert differing == []
    assert expected.state["algorithm"] == resumed.state["algorithm"]


def test_a_checkpoint_of_another_algorithm_is_refused(make_learner):
    first = make_learner(make_table(), make_model(), updates=4, conditioning="reward", batch_size=4)
    first.step()
    other = make_learner(make_table(), make_model(), updates=4, conditioning="advantage", batch_size=4)
    with pytest.raises(ConfigError, match=r"was trained by decision_transformer.*algorithm is conditioned"):
        other.resume(first.checkpoint())


@pytest.mark.parametrize(
    ("make", "conditioning", "name"),
    [
        (make_model, "none", "behaviour_cloning"),
        (make_model, "reward", "decision_transformer"),
        (lambda: make_model(use_returns=False), "reward", "behaviour_cloning"),
        (make_model, "success", "conditioned"),
        (make_memory, "none", "memory"),
        (make_hierarchical, "none", "hierarchical"),
    ],
)
def test_a_model_and_its_conditioning_name_their_algorithm(make, conditioning, name):
    config = make().config
    assert algorithm_for(config, conditioning) == name
    make_algorithm(name, model=config, conditioning=conditioning)


@pytest.mark.parametrize(
    ("name", "changes", "conditioning", "message"),
    [
        ("online_decision", (), "none", "did you mean 'online_decision_transformer'"),
        ("hierarchical", (), "none", "needs .*architecture hierarchical"),
        ("decision_transformer", (), "none", "needs a model that reads returns"),
        ("behaviour_cloning", (), "advantage", "gives conditioning 'advantage' no values"),
        ("behaviour_cloning", ("weight=1",), "none", "has no setting 'weight'; its settings are none"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name, changes, conditioning, message):
    with pytest.raises(ConfigError, match=message):
        make_algorithm(name, changes, model=make_model().config, conditioning=conditioning)
