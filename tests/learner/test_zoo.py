"""Every member of the zoo trains, publishes and resumes through the same learner."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from vla_dist.learner.config import LearnerConfig
from vla_dist.learner.learner import Learner
from vla_dist.learner.train_step import OptimiserConfig
from vla_dist.models.auto import build_policy
from vla_dist.testing.episodes import EpisodeTable, fill
from vla_dist.testing.registry import InMemoryRegistry
from vla_dist.testing.zoo import zoo_cases


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        cases = zoo_cases()
        metafunc.parametrize("case", cases, ids=[case.name for case in cases])


@pytest.fixture
def make_learner(case):
    made = []

    def make(registry, *, total_updates=4, first_batch=0):
        config = case.config
        table = EpisodeTable(
            case.spec,
            context_steps=config.context_steps,
            future_steps=config.horizon - 1,
            first_batch=first_batch,
        )
        fill(table, num_episodes=6)
        learner = Learner(
            LearnerConfig(
                policy_name="p",
                run_id="run",
                optimiser=OptimiserConfig(total_updates=total_updates),
                batch_size=4,
                updates_per_step=2,
                conditioning="steps_to_success",
                sample_timeout_s=5.0,
                start_timeout_s=5.0,
            ),
            model=case.build(),
            spec=case.spec,
            table=table,
            registry=registry,
            embed=case.embed,
        )
        made.append(learner)
        return learner

    yield make
    for learner in made:
        learner.close()


def test_two_updates_saved_and_resumed_and_two_more_are_four_straight_and_act(case, make_learner):
    registry = InMemoryRegistry()
    straight = make_learner(registry)
    metrics = straight.step()
    saved = straight.checkpoint()
    # A checkpoint shows the live tensors until it is written.
    saved = replace(saved, tensors={name: value.clone() for name, value in saved.tensors.items()})
    straight.step()
    assert straight.done
    assert all(np.isfinite(value) for value in metrics.values())

    torch.manual_seed(999)
    resumed = make_learner(InMemoryRegistry(), first_batch=2)
    resumed.resume(saved)
    resumed.step()
    expected, found = straight.checkpoint().tensors, resumed.checkpoint().tensors
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []

    policy = build_policy(registry.fetch("p", 1), embed=case.embed)
    observation = case.observation(0, is_first=True)
    (chunk,), _ = policy.act([observation], [policy.initial_state()])
    assert chunk.shape == (case.config.horizon, case.spec.action_dim)
    assert np.isfinite(chunk).all()
