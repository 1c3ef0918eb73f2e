from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from vla_dist.core.specs import CameraSpec
from vla_dist.models.analysis.costs import parameters_by_module
from vla_dist.models.analysis.flops import closed_form_flops, count_flops
from vla_dist.models.analysis.subjects import subject
from vla_dist.models.catalogue import reference_spec
from vla_dist.models.zoo import ARCHITECTURES, architecture
from vla_dist.testing.zoo import zoo_cases


@pytest.mark.parametrize("case", zoo_cases(), ids=lambda case: case.name)
def test_two_ways_of_counting_agree_for_every_member(case):
    model, policy = case.build(), case.build_policy(case.build())
    observation, batch = case.observation(1), case.batch(num_windows=2)
    _, (state,) = policy.act([observation], [policy.initial_state()])
    for call in (lambda: policy.act([observation], [state]), lambda: model.loss(batch)):
        torch.manual_seed(0)
        counted = count_flops(call)
        torch.manual_seed(0)
        assert counted > 0
        assert closed_form_flops(call) == pytest.approx(counted, rel=0.01)


def embedded(config):
    """Of one window: states, returns, actions and the goal."""
    return 2 * config.hidden_dim * (config.context_steps * (1 + config.state_dim + config.action_dim) + config.goal_dim)


def test_the_decision_transformer_costs_what_its_config_says():
    one = subject(architecture("decision_transformer"), "small")
    config, batch = one.config, one.batch(3)
    steps, width, inner = config.context_steps, config.hidden_dim, 4 * config.hidden_dim
    tokens = 3 * steps - 1 + config.num_goal_tokens  # the newest action is seen by nobody
    whole = tokens * (2 * width * 3 * width + 2 * width * width + 4 * width * inner) + 4 * tokens * tokens * width
    # The last block computes queries, output and MLP of the state tokens only.
    last = tokens * 4 * width * width + steps * (4 * width * width + 4 * width * inner) + 4 * steps * tokens * width
    head = 2 * steps * width * config.action_dim
    expected = 3 * ((config.n_layers - 1) * whole + last + embedded(config) + head)
    model = one.build()
    assert count_flops(lambda: model.loss(batch)) == expected
    assert closed_form_flops(lambda: model.loss(batch)) == expected


def test_a_single_head_projects_neither_keys_nor_values():
    one = subject(architecture("decision_transformer"), "gym")
    config, batch = one.config, one.batch(3)
    steps, width, inner = config.context_steps, config.hidden_dim, 4 * config.hidden_dim
    tokens = 3 * steps - 1 + config.num_goal_tokens
    whole = tokens * (4 * width * width + 4 * width * inner) + 4 * tokens * tokens * width
    last = steps * (4 * width * width + 4 * width * inner) + 4 * steps * tokens * width
    folding = config.n_layers * (2 * 2 * width**3 + 2 * 2 * width**2)
    head = 2 * steps * width * config.action_dim
    expected = 3 * ((config.n_layers - 1) * whole + last + embedded(config) + head) + folding
    model = one.build()
    assert count_flops(lambda: model.loss(batch)) == expected
    assert closed_form_flops(lambda: model.loss(batch)) == expected


def test_formulas_of_single_layers():
    image, tokens = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 6)
    cases = [
        (lambda: torch.nn.Conv2d(4, 6, 3, stride=2, groups=2)(image), 2 * 2 * 6 * 3 * 3 * 2 * 9),
        (lambda: torch.nn.Linear(6, 7)(tokens), 2 * 2 * 5 * 6 * 7),
        (lambda: tokens @ tokens.mT, 2 * 2 * 5 * 6 * 5),
        (lambda: torch.einsum("bld,bmd->blm", tokens, tokens), 2 * 2 * 5 * 6 * 5),
        (
            lambda: scaled_dot_product_attention(*(torch.randn(2, 3, n, 4) for n in (5, 7, 7))),
            4 * 2 * 3 * 5 * 7 * 4,
        ),
        (lambda: tokens + 1, 0),
    ]
    for call, expected in cases:
        assert closed_form_flops(call) == count_flops(call) == expected


def test_backward_costs_twice_the_forward_pass():
    layer, tokens = torch.nn.Linear(16, 16), torch.randn(8, 16, requires_grad=True)
    assert count_flops(lambda: layer(tokens).sum().backward()) == 3 * count_flops(lambda: layer(tokens))


def test_rt1_has_the_papers_size():
    camera = CameraSpec(name="camera", height=300, width=300)
    config = ARCHITECTURES["rt1"].configure("full", replace(reference_spec(), cameras=(camera,)))
    with torch.device("meta"):
        parts = parameters_by_module(ARCHITECTURES["rt1"].model(config))
    decoder = sum(parts[name] for name in ("layers", "embed_token", "embed_position", "head") if name in parts)
    assert 33e6 < sum(parts.values()) < 37e6
    assert 18e6 < decoder < 20e6
