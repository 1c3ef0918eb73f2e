"""InterpretableVLA sees every layer of every member and changes nothing."""

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTModel

from vla_dist.core.errors import ConfigError, NotFound
from vla_dist.models.interpretation.attention import InterpretableVLA
from vla_dist.models.transformer import Transformer, attention_bias, causal_visibility
from vla_dist.testing.zoo import zoo_cases

CASES = zoo_cases()


def num_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def rows_sum_to_one(maps: dict[str, torch.Tensor]) -> None:
    for name, weights in maps.items():
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), atol=1e-4, rtol=0, msg=name)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_watching_a_member_changes_not_one_bit_of_what_it_does(case):
    model, batch = case.build(), case.batch()
    torch.manual_seed(2)
    expected = model.loss(batch)[0]
    watched = InterpretableVLA(model)
    torch.manual_seed(2)
    with watched.watch() as maps:
        assert torch.equal(watched.loss(batch)[0], expected)
    assert num_hooks(model) == 0
    if maps:
        rows_sum_to_one(watched.get_attention_maps())
    policy = case.build_policy(model)
    observation = case.observation(0, is_first=True)
    plain = policy.act([observation], [policy.initial_state()])[0][0]
    with watched.watch():
        seen = policy.act([observation], [policy.initial_state()])[0][0]
    assert plain.tobytes() == seen.tobytes()


def test_the_weights_are_those_that_mix_the_values():
    torch.manual_seed(0)
    model = Transformer(dim=8, num_layers=2, num_heads=2, inner_dim=16).eval()
    tokens, visible = torch.randn(3, 5, 8), causal_visibility(torch.ones(3, 5, dtype=torch.bool))
    watched = InterpretableVLA(model)
    output = watched(tokens, visible)
    assert torch.equal(output, model(tokens, visible))
    maps = watched.get_attention_maps()
    assert list(maps) == ["blocks.0.attention", "blocks.1.attention"]
    attention = model.blocks[0].attention
    normed = model.blocks[0].attention_norm(tokens)
    value = attention.qkv(normed)[..., 16:].unflatten(-1, (2, 4)).transpose(1, 2)
    mixed = (maps["blocks.0.attention"] @ value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention.out(mixed), attention(normed, attention_bias(visible, torch.float32)))
    assert maps["blocks.0.attention"].triu(1).abs().max() == 0


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_transformers_models_are_seen_fused_or_not(implementation: str):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    model = ViTModel(ViTConfig(image_size=32, patch_size=8, **sizes), add_pooling_layer=False).eval()
    model.set_attn_implementation(implementation)
    watched = InterpretableVLA(model)
    pixels = torch.randn(2, 3, 32, 32)
    output = watched(pixels).last_hidden_state
    assert torch.equal(output, model(pixels).last_hidden_state)
    maps = watched.get_attention_maps()
    assert [tuple(weights.shape) for weights in maps.values()] == [(2, 2, 17, 17)] * 2
    rows_sum_to_one(maps)
    model.set_attn_implementation("eager")
    eager = model(pixels, output_attentions=True).attentions
    for mine, theirs in zip(maps.values(), eager, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def test_each_call_forgets_the_one_before_and_repeated_layers_are_numbered():
    model = Transformer(dim=8, num_layers=1, num_heads=2, inner_dim=16).eval()
    watched = InterpretableVLA(model)
    for length in (3, 4):
        watched(torch.randn(1, length, 8), causal_visibility(torch.ones(1, length, dtype=torch.bool)))
        assert [weights.shape[-1] for weights in watched.get_attention_maps().values()] == [length]
    visible = causal_visibility(torch.ones(1, 3, dtype=torch.bool))
    with watched.watch():
        model(torch.randn(1, 3, 8), visible)
        model(torch.randn(1, 3, 8), visible)
    assert list(watched.get_attention_maps()) == ["blocks.0.attention", "blocks.0.attention#1"]


def test_a_call_that_fails_leaves_no_hook_behind_and_the_next_is_seen():
    model = Transformer(dim=8, num_layers=1, num_heads=2, inner_dim=16).eval()
    watched = InterpretableVLA(model)
    visible = causal_visibility(torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(RuntimeError):
        watched(torch.randn(1, 3, 9), visible)
    assert num_hooks(model) == 0
    watched(torch.randn(1, 3, 8), visible)
    assert list(watched.get_attention_maps()) == ["blocks.0.attention"]


def test_what_has_no_attention_says_so():
    watched = InterpretableVLA(nn.Linear(2, 2))
    watched(torch.zeros(1, 2))
    with pytest.raises(NotFound, match="no attention was seen in Linear"):
        watched.get_attention_maps()
    with pytest.raises(ConfigError, match="no torch module"):
        InterpretableVLA("model")  # pyright: ignore[reportArgumentType]


def test_the_wrapper_answers_for_its_model():
    case = next(case for case in CASES if case.name == "decision_transformer-default")
    model = case.build()
    watched = InterpretableVLA(model)
    assert watched.config is model.config
    with pytest.raises(AttributeError):
        _ = watched.wings
