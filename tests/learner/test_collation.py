from dataclasses import fields

import numpy as np
import pytest
import torch

from vla_dist.core.errors import ConfigError
from vla_dist.learner.loader import Collator
from vla_dist.models.conditioning import ReturnConditioning
from vla_dist.models.goals import GoalTable
from vla_dist.testing.episodes import EpisodeTable, fill
from vla_dist.testing.fakes import make_spec

SPEC = make_spec()


def embed(texts):
    return np.array([[len(text), sum(text.encode())] for text in texts], np.float32)


class Chunking:
    """The settings of a member that predicts three actions."""

    state_dim, action_dim, context_steps, horizon, goal_dim, cameras, head = 5, 2, 4, 3, 2, (), "tanh"


def collate(*, phrases, future_steps=2, index=0, is_pinned=False):
    table = EpisodeTable(SPEC, context_steps=4, future_steps=future_steps)
    fill(table, num_episodes=4)
    collator = Collator(
        model=Chunking(),
        spec=SPEC,
        conditioning=ReturnConditioning(),
        goals=GoalTable(embed),
        phrases=phrases,
        seed=(0,),
        is_pinned=is_pinned,
    )
    batch = table.sample(32, timeout_s=1)
    return batch, collator(batch, index)


def test_the_words_of_a_window_are_those_that_its_goal_was_made_of():
    phrases = {"go": ("walk", "run", "march")}
    batch, collated = collate(phrases=phrases)
    assert len(set(collated.instructions)) > 2
    for task, own, words in zip(batch.tasks, batch.instructions, collated.instructions, strict=True):
        assert words in phrases[task] if task in phrases else words == own
    np.testing.assert_array_equal(collated.goals, embed(collated.instructions))
    assert collate(phrases=phrases, index=1)[1].instructions != collated.instructions


def test_chunks_are_as_long_as_the_members_horizon():
    _, collated = collate(phrases={})
    assert collated.target_chunks.shape == (32, 3, 2)
    assert not collated.chunk_mask.all()
    with pytest.raises(ConfigError, match="future_steps to 2"):
        collate(phrases={}, future_steps=1)


def test_for_a_gpu_every_tensor_of_a_batch_is_pinned_by_the_loader(monkeypatch):
    """Without a GPU no memory can be pinned, so what asks for it is watched."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.data_ptr()) or tensor)
    _, batch = collate(phrases={})
    assert pinned == []
    _, batch = collate(phrases={}, is_pinned=True)
    tensors = [value for one in fields(batch) if isinstance(value := getattr(batch, one.name), torch.Tensor)]
    assert len(tensors) >= 10
    assert {tensor.data_ptr() for tensor in tensors} <= set(pinned)
