import numpy as np
import pytest
import torch

from vla_dist.learner.config import LearnerConfig
from vla_dist.learner.learner import Learner
from vla_dist.learner.train_step import OptimiserConfig
from vla_dist.models.decision_transformer.decision_transformer import DecisionTransformer
from vla_dist.models.decision_transformer.presets import PRESETS
from vla_dist.testing.episodes import EpisodeTable, fill
from vla_dist.testing.fakes import make_spec
from vla_dist.testing.registry import InMemoryRegistry

K, G = 4, 8
SPEC = make_spec()


@pytest.fixture(autouse=True)
def _one_thread_and_fixed_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def fake_embed(texts):
    return np.stack([np.random.default_rng(sum(t.encode())).normal(size=G).astype(np.float32) for t in texts])


@pytest.fixture
def registry():
    return InMemoryRegistry()


@pytest.fixture
def make_table():
    """Tables of the same 9 episodes; ``first_batch`` says where its draws begin."""

    def make(*, num_episodes=9, **settings):
        table = EpisodeTable(SPEC, context_steps=K, **settings)
        fill(table, num_episodes=num_episodes)
        return table

    return make


@pytest.fixture
def make_model():
    def make(**changes):
        torch.manual_seed(1)
        settings = {"hidden_dim": 32, "n_layers": 2, "n_heads": 4, "context_steps": K, "goal_dim": G, "dropout": 0.1}
        return DecisionTransformer(PRESETS["small"](SPEC, **{**settings, **changes}))

    return make


@pytest.fixture
def make_learner(make_model, make_table, registry):
    """Learners that are closed when the test ends."""
    made = []

    def make(*, table=None, model=None, optimiser=None, embed=fake_embed, phrases=None, registry=registry, **settings):
        checkpoints, rank = settings.pop("checkpoints", None), settings.pop("rank", None)
        config = LearnerConfig(
            **{
                "policy_name": "p",
                "run_id": "run",
                "optimiser": OptimiserConfig(total_updates=4, **(optimiser or {})),
                "batch_size": 8,
                "updates_per_step": 2,
                "sample_timeout_s": 2.0,
                "start_timeout_s": 0.3,
                **settings,
            }
        )
        learner = Learner(
            config,
            model=model or make_model(),
            spec=SPEC,
            table=table or make_table(),
            registry=registry,
            embed=embed,
            phrases=phrases,
            checkpoints=checkpoints,
            rank=rank,
        )
        made.append(learner)
        return learner

    yield make
    for learner in made:
        learner.close()
