"""Policies from artifacts: whatever a model holds that no artifact does is computed, everything else only loaded."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from vla_dist.models import auto
from vla_dist.models.auto import build_model, make_artifact
from vla_dist.models.conditioning import ReturnConditioning
from vla_dist.models.decision_transformer.decision_transformer import DecisionTransformer
from vla_dist.models.decision_transformer.presets import PRESETS
from vla_dist.testing.fakes import make_spec


def test_building_a_policy_draws_no_weights_that_are_replaced_at_once():
    spec = make_spec()
    model = DecisionTransformer(PRESETS["mini"](spec, goal_dim=0))
    artifact = make_artifact(model, name="p", spec=spec, conditioning=ReturnConditioning())
    before = torch.get_rng_state()
    built, _, _ = build_model(artifact)
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in model.state_dict().items():
        assert torch.equal(built.state_dict()[name], value)
    assert all(p.requires_grad for p in built.parameters())


class WithTable(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.project = nn.Linear(2, 2)
        self.register_buffer("table", torch.arange(3.0), persistent=False)


class WithPlainTensor(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.plain = torch.arange(3.0)


class WithSharedWeights(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.one, self.other = nn.Linear(2, 2), nn.Linear(2, 2)
        self.other.weight = self.one.weight


@pytest.mark.parametrize("kind", [WithTable, WithPlainTensor, WithSharedWeights])
def test_a_model_that_assigned_weights_would_leave_incomplete_is_computed(kind):
    assert auto._skeleton(SimpleNamespace(model=kind), None) is None
    assert auto._skeleton(SimpleNamespace(model=lambda config: nn.Linear(2, 2)), None) is not None


def test_versions_of_one_model_share_no_tensor():
    spec = make_spec()
    model = DecisionTransformer(PRESETS["mini"](spec, goal_dim=0))
    artifact = make_artifact(model, name="p", spec=spec, conditioning=ReturnConditioning())
    first, second = build_model(artifact)[0], build_model(artifact)[0]
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    for name, value in second.state_dict().items():
        assert value.device.type == "cpu"
        assert torch.equal(value, model.state_dict()[name])
        assert np.array_equal(artifact.tensors[name], model.state_dict()[name].numpy())
