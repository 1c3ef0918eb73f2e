"""Tiny tasks, recorded by hand, that a learner trains on through its whole path to a published policy."""

import numpy as np
import pytest
import torch

from vla_dist.core.types import Observation, Segment
from vla_dist.learner.config import LearnerConfig
from vla_dist.learner.learner import Learner
from vla_dist.learner.train_step import OptimiserConfig
from vla_dist.models.auto import build_policy
from vla_dist.models.decision_transformer.decision_transformer import DecisionTransformer
from vla_dist.models.decision_transformer.presets import PRESETS
from vla_dist.testing.fakes import make_spec
from vla_dist.testing.registry import InMemoryRegistry

SPEC = make_spec(proprio_dim=2, action_dim=1, max_episode_steps=20)


@pytest.fixture(autouse=True)
def _one_thread_and_fixed_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def record(table, proprio, actions, *, rewards=None, success=True, version=0, interventions=None, task="go"):
    """Append one whole episode of (T, 2) proprio and (T, 1) actions; ``version`` 0 is an expert's."""
    steps = len(proprio)
    segment = Segment(
        episode_id=f"episode-{sum(1 for _ in table.episodes())}",
        segment_index=0,
        robot_id="robot-0",
        task=task,
        instruction=f"please {task}",
        policy_version=version,
        source="policy" if version else "expert",
        is_last=True,
        success=success,
        length=steps,
        proprio=np.asarray(proprio, np.float32),
        actions=np.asarray(actions, np.float32),
        target_actions=np.asarray(actions, np.float32),
        rewards=np.zeros(steps, np.float32) if rewards is None else np.asarray(rewards, np.float32),
        interventions=np.zeros(steps, bool) if interventions is None else np.asarray(interventions, bool),
    )
    table.append(segment, timeout_s=1.0)


def make_model(**changes):
    torch.manual_seed(1)
    settings = {"hidden_dim": 32, "n_layers": 1, "n_heads": 2, "context_steps": 2, "goal_dim": 0, "dropout": 0.0}
    return DecisionTransformer(PRESETS["small"](SPEC, **{**settings, "return_dropout": 0.0, **changes}))


@pytest.fixture
def make_learner():
    """Learners that are closed when the test ends."""
    made = []

    def make(table, model, *, updates=200, learning_rate=3e-3, registry=None, batch_size=32, **settings):
        config = LearnerConfig(
            policy_name="p",
            run_id="run",
            optimiser=OptimiserConfig(total_updates=updates, learning_rate=learning_rate),
            batch_size=batch_size,
            sample_timeout_s=5.0,
            start_timeout_s=5.0,
            **settings,
        )
        registry = registry or InMemoryRegistry()
        made.append(Learner(config, model=model, spec=SPEC, table=table, registry=registry, embed=lambda texts: None))
        return made[-1]

    yield make
    for learner in made:
        learner.close()


@pytest.fixture
def train(make_learner):
    """Trains to the end; gives the metrics of the last step and the policy that was published."""

    def run(table, model, **settings):
        registry = InMemoryRegistry()
        learner, metrics = make_learner(table, model, registry=registry, **settings), {}
        while not learner.done:
            metrics = learner.step()
        return metrics, build_policy(registry.fetch("p", registry.resolve("p@stable")))

    return run


def first_action(policy, proprio):
    """(A,) in the first step of an episode."""
    observation = Observation(proprio=np.asarray(proprio, np.float32), instruction="please go")
    (chunk,), _ = policy.act([observation], [policy.initial_state()])
    return chunk[0]
