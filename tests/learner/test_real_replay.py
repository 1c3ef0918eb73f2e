"""Algorithms on the real replay: what they need of its batches is there, over one server and over two."""

import dataclasses

import numpy as np
import pytest
import torch

from vla_dist.learner.algorithms.interventions import InterventionWeights
from vla_dist.learner.config import LearnerConfig
from vla_dist.learner.learner import Learner
from vla_dist.learner.train_step import OptimiserConfig
from vla_dist.models.decision_transformer.decision_transformer import DecisionTransformer
from vla_dist.models.decision_transformer.presets import PRESETS
from vla_dist.models.memory.memory_vla import MemoryAugmentedVLA, MemoryAugmentedVLAConfig
from vla_dist.replay.config import BufferConfig, Stratified, TableConfig, Uniform
from vla_dist.replay.limiter import LimiterConfig
from vla_dist.replay.server import EmbeddedServer
from vla_dist.replay.shards import ShardedReplayTable
from vla_dist.replay.table import RedisReplayTable
from vla_dist.testing.fakes import make_segment, make_spec
from vla_dist.testing.registry import InMemoryRegistry

SPEC, K, T = make_spec(), 4, 8


@pytest.fixture(scope="module")
def urls(tmp_path_factory):
    with (
        EmbeddedServer(tmp_path_factory.mktemp("one")) as one,
        EmbeddedServer(tmp_path_factory.mktemp("two")) as two,
    ):
        yield one.url, two.url


@pytest.fixture
def learn(urls):
    """Trains a model on a new replay, and gives the metrics of the last step and the batches' episodes."""
    opened = []

    def run(name, model, *, sampler=None, num_servers=1, future_steps=0, **settings):
        limiter = LimiterConfig(min_steps=1, samples_per_insert=None)
        tables = (TableConfig(sampler=sampler or Uniform(), limiter=limiter),)
        config = BufferConfig(name=name, num_steps=T, context_steps=K, future_steps=future_steps, tables=tables)
        is_single = num_servers == 1
        table = RedisReplayTable(urls[0], SPEC, config) if is_single else ShardedReplayTable(urls, SPEC, config)
        opened.append(table)
        for number in range(16):
            append(table, number)
        learner = Learner(
            LearnerConfig(
                policy_name="p",
                run_id="r",
                optimiser=OptimiserConfig(total_updates=40),
                batch_size=16,
                updates_per_step=20,
                **settings,
            ),
            model=model,
            spec=SPEC,
            table=table,
            registry=InMemoryRegistry(),
            embed=lambda texts: np.ones((len(texts), 8), np.float32),
        )
        opened.append(learner)
        metrics = {}
        while not learner.done:
            metrics = learner.step()
        return metrics, learner

    torch.set_num_threads(1)
    yield run
    for one in reversed(opened):
        one.close()


def append(table, number):
    """An episode of 16 steps: every fourth is a demonstration, and in every fourth a person takes over at step 12."""
    for index in range(2):
        steps = index * T + np.arange(T)
        segment = make_segment(
            SPEC, episode_id=f"e{number}", segment_index=index, num_steps=T, is_last=index == 1, seed=number
        )
        own = {
            "source": "expert" if number % 4 == 0 else "policy",
            "policy_version": 0 if number % 4 == 0 else 1,
            "interventions": (steps >= 12) & (number % 4 == 1),
        }
        table.append(dataclasses.replace(segment, **own), timeout_s=5)


def make_transformer():
    size = {"hidden_dim": 16, "n_layers": 1, "n_heads": 2, "context_steps": K, "goal_dim": 8}
    return DecisionTransformer(PRESETS["small"](SPEC, **size))


def make_memory():
    return MemoryAugmentedVLA(
        MemoryAugmentedVLAConfig(
            state_dim=5, action_dim=2, goal_dim=8, memory_size=4, memory_dim=8, num_heads=2, context_steps=K,
            burn_in_steps=2,
        )
    )  # fmt: skip


def test_prior_data_have_their_share_and_corrections_theirs_of_the_weight(learn):
    metrics, _ = learn(
        "mixed",
        make_transformer(),
        sampler=Stratified(shares={"demo": 0.5, "policy": 0.5}),
        future_steps=3,
        interventions=InterventionWeights(before_steps=3),
        conditioning="reward_advantage",
    )
    assert metrics["share_expert"] == metrics["share_policy"] == 0.5
    assert np.isfinite(metrics["loss"])
    assert 0 < metrics["value_surprise"] < 4


@pytest.mark.parametrize("num_servers", [1, 2])
def test_windows_find_the_states_that_earlier_ones_of_their_episode_left(learn, num_servers):
    metrics, learner = learn(f"memory-{num_servers}", make_memory(), num_servers=num_servers)
    assert metrics["stored_state_share"] > 0.8
    keys = learner.checkpoint().tensors["algorithm_memory/keys"]
    # No two episodes share an identity, whichever server they lie on.
    assert keys[:, 0].unique().numel() == 16
    assert keys[:, 1].min() >= 1
    assert keys[:, 1].max() == 2 * T
