import pytest
import torch
from transformers import AutoConfig, AutoModel

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.models.fusion import FUSIONS, MultimodalFusion

B, N, L, V, W, D = 3, 5, 4, 12, 10, 16


def build(fusion_type):
    return MultimodalFusion(V, D, fusion_type, language_dim=W, num_heads=4)


def inputs(*, tokens):
    visual = torch.randn(B, N, V) if tokens else torch.randn(B, V)
    language = torch.randn(B, L, W) if tokens else torch.randn(B, W)
    return visual.requires_grad_(), language.requires_grad_()


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("fusion_type", FUSIONS)
def test_gives_one_vector_and_every_parameter_and_both_modalities_learn(fusion_type, tokens):
    fusion, (visual, language) = build(fusion_type), inputs(tokens=tokens)
    fused = fusion(visual, language)
    assert fused.shape == (B, D)
    (fused * torch.randn_like(fused)).sum().backward()
    assert visual.grad.flatten(1).any(1).all()
    assert language.grad.flatten(1).any(1).all()
    for name, parameter in fusion.named_parameters():
        # A bias on all keys alike shifts each row of scores and cancels in the softmax.
        grad = parameter.grad[D:] if name == "attention.key_value.bias" else parameter.grad
        assert grad.abs().max() > 1e-7, name


@pytest.mark.parametrize("fusion_type", FUSIONS)
def test_what_is_masked_out_is_as_if_it_were_not_there(fusion_type):
    fusion, (visual, language) = build(fusion_type), inputs(tokens=True)
    seen, said = torch.arange(N) < 3, torch.arange(L) < 2
    masks = {"visual_mask": seen.expand(B, N), "language_mask": said.expand(B, L)}
    expected = fusion(visual[:, :3], language[:, :2])
    torch.testing.assert_close(fusion(visual, language, **masks), expected, atol=1e-6, rtol=0)
    assert not torch.allclose(fusion(visual, language), expected, atol=1e-4)


@pytest.mark.parametrize("fusion_type", FUSIONS)
def test_rows_do_not_meet_and_nothing_at_all_is_finite(fusion_type):
    fusion, (visual, language) = build(fusion_type), inputs(tokens=True)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(fusion(visual[order], language[order]), fusion(visual, language)[order])
    nothing = {"visual_mask": torch.zeros(B, N), "language_mask": torch.zeros(B, L)}
    assert fusion(visual, language, **nothing).isfinite().all()


def test_the_gate_decides_between_the_modalities():
    fusion, (visual, language) = build("gated_fusion"), inputs(tokens=False)
    with torch.no_grad():
        fusion.gate.weight.zero_()
        fusion.gate.bias.fill_(20.0)
    torch.testing.assert_close(fusion(visual, language), fusion(visual, torch.randn(B, W)), atol=1e-5, rtol=0)
    with torch.no_grad():
        fusion.gate.bias.fill_(-20.0)
    torch.testing.assert_close(fusion(visual, language), fusion(torch.randn(B, V), language), atol=1e-5, rtol=0)


def test_attention_weights_are_those_that_are_used_and_sum_to_one():
    fusion, (visual, language) = build("cross_attention"), inputs(tokens=True)
    said = (torch.arange(L) < 2).expand(B, L)
    weights = fusion.attention_weights(visual, language, language_mask=said)
    assert weights.shape == (B, 4, N, 1 + L)
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, 4, N))
    assert not weights[..., 3:].any()
    attention = fusion.attention
    tokens = fusion.visual_norm(fusion.project_visual(visual))
    others = fusion.language_norm(fusion.project_language(language))
    _, _, value, _ = attention._split(tokens, others, said)
    by_hand = attention.out((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(tokens, others, said), by_hand)
    one_word = fusion.attention_weights(visual, language[:, :1])
    assert one_word[..., 1].max() < 1


@pytest.mark.parametrize("fusion_type", FUSIONS)
def test_saved_and_loaded_by_transformers_is_the_same(fusion_type, tmp_path):
    fusion, (visual, language) = build(fusion_type), inputs(tokens=True)
    fusion.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is MultimodalFusion
    assert torch.equal(loaded(visual, language), fusion.eval()(visual, language))
    assert AutoConfig.from_pretrained(tmp_path).fusion_type == fusion_type
    torch.manual_seed(0)
    simple = MultimodalFusion(V, D, fusion_type, num_heads=4)
    assert simple(visual, torch.randn(B, V)).shape == (B, D)


def test_what_cannot_work_is_named():
    with pytest.raises(ConfigError, match="positive"):
        MultimodalFusion(V, D, language_dim=0)
    with pytest.raises(ConfigError, match="did you mean 'num_heads'"):
        MultimodalFusion(V, D, num_head=4)
    with pytest.raises(ConfigError, match="bilinear"):
        MultimodalFusion(V, D, "bilinear")
    with pytest.raises(ConfigError, match="heads do not divide"):
        MultimodalFusion(V, 18, "cross_attention", num_heads=4)
    fusion = build("concat")
    with pytest.raises(DataError, match="language"):
        fusion(torch.randn(B, V), torch.randn(B, V))
    with pytest.raises(DataError, match="mask"):
        fusion(torch.randn(B, N, V), torch.randn(B, W), visual_mask=torch.ones(B, N + 1))
    with pytest.raises(DataError, match="rows"):
        fusion(torch.randn(B, V), torch.randn(B + 1, W))
    with pytest.raises(ConfigError, match="cross_attention"):
        fusion.attention_weights(torch.randn(B, V), torch.randn(B, W))
