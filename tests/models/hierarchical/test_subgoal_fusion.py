"""How the built-in controller reads its subgoal: beside what it sees, or as what scales and shifts it."""

from dataclasses import replace

import pytest
import torch

from vla_dist.core.errors import ConfigError
from vla_dist.models.hierarchical.config import HierarchicalVLAConfig
from vla_dist.models.hierarchical.hierarchical_vla import HierarchicalVLA
from vla_dist.models.zoo import architecture
from vla_dist.testing.fakes import make_spec
from vla_dist.testing.windows import make_train_batch

SPEC = make_spec(proprio_dim=3, action_dim=2)
SKILLS = ("left", "right")


def configure(**changes) -> HierarchicalVLAConfig:
    settings = {"goal_dim": 0, "skills": SKILLS, "hidden_dim": 0, "subgoal_dim": 4, "context_steps": 4, **changes}
    return architecture("hierarchical").configure("tiny", SPEC, **settings)


def learn(model: HierarchicalVLA, updates: int = 200) -> float:
    """The error that is left where what is to be done is the product of what is seen and what is wanted."""
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    error = float("nan")
    for _ in range(updates):
        batch = make_train_batch(model.config, num_windows=32)
        states = torch.randint(0, 2, batch.states.shape, generator=generator).float() * 2 - 1
        wanted = torch.randint(0, 2, (32,), generator=generator)
        targets = torch.zeros_like(batch.target_actions)
        targets[..., 0] = 0.8 * states[..., 0] * (2 * wanted[:, None] - 1)
        batch = replace(
            batch,
            states=states,
            target_actions=targets,
            tasks=tuple(SKILLS[index] for index in wanted.tolist()),
            padding_mask=torch.ones_like(batch.padding_mask),
        )
        loss, metrics = model.loss(batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        error = float(metrics["action_error"])
    return error


@pytest.mark.parametrize(("fusion", "is_learned"), [("concat", False), ("film", True)])
def test_what_is_seen_times_what_is_wanted_is_learned_by_film_alone(fusion: str, is_learned: bool):
    torch.manual_seed(0)
    error = learn(HierarchicalVLA(configure(subgoal_fusion=fusion)))
    assert error < 0.1 if is_learned else error > 0.3


def test_the_termination_reads_its_subgoal_alike():
    torch.manual_seed(0)
    model = HierarchicalVLA(configure(subgoal_fusion="film", learned_termination=True))
    low, subgoals = torch.randn(5, 3, model.config.low_level_dim), torch.randn(5, 3, 4)
    before = model.stop_logits(low, subgoals)
    assert before.shape == (5, 3)
    torch.nn.init.normal_(model.terminate.told.film.weight)
    after = model.stop_logits(low, subgoals)
    assert not torch.allclose(before, after)
    # One by one as together.
    torch.testing.assert_close(after[2, 1:2], model.stop_logits(low[2, 1:2], subgoals[2, 1:2]))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"subgoal_fusion": "gate"}, "'gate' must be one of concat, film"),
        (
            {"subgoal_fusion": "film", "controller": {"architecture": "decision_transformer"}},
            "of the built-in controller",
        ),
    ],
)
def test_fusions_that_cannot_be_are_refused(changes: dict, complaint: str):
    with pytest.raises(ConfigError, match=complaint):
        configure(**changes)
