import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from vla_dist.core.errors import ConfigError
from vla_dist.models.transformer import Dropout, Transformer, attention_bias, causal_visibility


def make_transformer(**changes):
    settings = {"dim": 16, "num_layers": 3, "num_heads": 4, "inner_dim": 32}
    return Transformer(**{**settings, **changes}).eval()


@pytest.fixture
def tokens():
    return torch.randn(2, 9, 16)


@pytest.fixture
def visible():
    is_key = torch.ones(2, 9, dtype=torch.bool)
    is_key[1, :3] = False
    return causal_visibility(is_key)


@pytest.fixture
def bias(visible):
    return attention_bias(visible, torch.float32)


@pytest.mark.parametrize("num_heads", [1, 4])
def test_reading_some_tokens_gives_the_same_tokens_and_gradients(tokens, visible, num_heads):
    model = make_transformer(num_heads=num_heads)
    wanted = slice(1, None, 3)

    def gradients(read):
        model.zero_grad()
        read().square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    whole = gradients(lambda: model(tokens, visible)[:, wanted])
    some = gradients(lambda: model(tokens, visible, read=wanted))
    torch.testing.assert_close(model(tokens, visible, read=wanted), model(tokens, visible)[:, wanted])
    for one, other in zip(some, whole, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_the_last_block_computes_only_what_is_read(tokens, visible):
    model = make_transformer()
    seen = []
    for block in model.blocks:
        block.mlp_norm.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    model(tokens, visible, read=slice(-1, None))
    assert seen == [9, 9, 1]


def test_an_activation_in_place_makes_autograd_copy_nothing():
    """ReLU once wrote into a view, for which autograd copied the largest array of a block four times an update."""
    model = make_transformer(activation="relu")
    found = []
    for block in model.blocks:
        block.narrow.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].grad_fn.name()))
    tokens = torch.randn(2, 9, model.blocks[0].widen.in_features, requires_grad=True)
    model(tokens, causal_visibility(torch.ones(2, 9, dtype=torch.bool)))
    assert found == ["ReluBackward0"] * len(model.blocks)


def test_one_mask_for_all_rows_where_nothing_is_hidden():
    all_keys = torch.ones(3, 5, dtype=torch.bool)
    one, each = causal_visibility(all_keys), causal_visibility(all_keys.index_fill(1, torch.tensor(2), False))
    assert (one.shape, each.shape) == ((1, 1, 5, 5), (3, 1, 5, 5))
    assert torch.equal(one[0, 0], torch.ones(5, 5).tril().bool())
    assert each[0, 0].diagonal().all()
    assert each[0, 0].sum() == one.sum() - 2, "the hidden token is seen by itself alone"


def test_dropout_hides_the_share_it_says_and_keeps_the_mean():
    values = torch.ones(1000, 1001)
    hidden = Dropout(0.1)(values)
    assert hidden.eq(0).float().mean().item() == pytest.approx(0.1, abs=2e-3)
    assert hidden.mean().item() == pytest.approx(1.0, abs=2e-3)
    assert hidden.unique().numel() == 2
    again = Dropout(0.1)(values)
    both = (hidden.eq(0) & again.eq(0)).float().mean().item()
    assert both == pytest.approx(0.01, abs=1e-3)
    neighbours = (hidden[:, 1:].eq(0) & hidden[:, :-1].eq(0)).float().mean().item()
    assert neighbours == pytest.approx(0.01, abs=1e-3)
    assert torch.equal(Dropout(0.1).eval()(values), values)
    with pytest.raises(ConfigError, match="dropout"):
        Dropout(1.0)


def test_dropout_follows_the_seed_and_its_gradient_is_its_mask():
    def run():
        torch.manual_seed(3)
        values = torch.ones(7, 5, requires_grad=True)
        hidden = Dropout(0.5)(values)
        hidden.sum().backward()
        return hidden, values.grad

    first, gradient = run()
    assert torch.equal(first, run()[0])
    assert torch.equal(gradient, first)


@pytest.mark.parametrize("num_heads", [1, 4])
def test_attention_with_dropout_has_the_mean_of_attention_without(tokens, bias, num_heads):
    attention = make_transformer(num_heads=num_heads).blocks[0].attention
    torch.nn.init.normal_(attention.qkv.bias)
    plain = attention(tokens, bias)
    attention.train()
    attention.dropout = 1e-6  # rounds to nothing, but takes the path with dropout
    torch.testing.assert_close(attention(tokens, bias), plain, atol=1e-6, rtol=1e-5)
    attention.dropout = 0.3
    mean = torch.stack([attention(tokens, bias) for _ in range(3000)]).mean(0)
    torch.testing.assert_close(mean, plain, atol=0.05, rtol=0)
    assert not torch.allclose(attention(tokens, bias), plain, atol=1e-3)


def reference(attention, tokens, bias, num_heads):
    """Attention as it is written down: queries, keys and values one by one."""
    shape = (2, 9, 3, num_heads, 16 // num_heads)
    query, key, value = attention.qkv(tokens).view(shape).permute(2, 0, 3, 1, 4)
    mixed = scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return attention.out(mixed.transpose(1, 2).reshape(2, 9, 16))


@pytest.mark.parametrize("num_heads", [1, 4])
def test_attention_and_its_gradients_are_those_of_torch(tokens, bias, num_heads):
    attention = make_transformer(num_heads=num_heads).blocks[0].attention
    torch.nn.init.normal_(attention.qkv.bias)
    torch.nn.init.normal_(attention.out.bias)
    found = []
    for compute in (attention, lambda *inputs: reference(attention, *inputs, num_heads)):
        attention.zero_grad()
        leaf = tokens.clone().requires_grad_()
        output = compute(leaf, bias)
        output.square().sum().backward()
        found.append([output, leaf.grad, *(p.grad.clone() for p in attention.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
