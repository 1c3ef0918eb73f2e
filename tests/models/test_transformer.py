import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from vla_dist.core.errors import ConfigError
from vla_dist.models.transformer import Dropout, Transformer, causal_visibility


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


def test_reading_some_tokens_gives_the_same_tokens_and_gradients(tokens, visible):
    model = make_transformer()
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
        block.widen.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    model(tokens, visible, read=slice(-1, None))
    assert seen == [9, 9, 1]


def test_tokens_added_to_a_cache_equal_tokens_read_at_once(tokens, visible):
    model = make_transformer()
    cache = torch.full((3, 2, 2, 9, 16), torch.nan)
    parts = []
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        part = cache[:, :, :, :stop]
        parts.append(model(tokens[:, start:stop], visible[:, :, start:stop, :stop], cache=part))
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens, visible))
    assert torch.isfinite(cache).all()


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


def test_attention_with_dropout_has_the_mean_of_attention_without(tokens, visible):
    attention = make_transformer().blocks[0].attention
    plain = attention(tokens, visible)
    attention.train()
    attention.dropout = 1e-6  # rounds to nothing, but takes the path with dropout
    torch.testing.assert_close(attention(tokens, visible), plain, atol=1e-6, rtol=1e-5)
    attention.dropout = 0.3
    mean = torch.stack([attention(tokens, visible) for _ in range(3000)]).mean(0)
    torch.testing.assert_close(mean, plain, atol=0.03, rtol=0)
    assert not torch.allclose(attention(tokens, visible), plain, atol=1e-3)


def test_attention_is_that_of_torch(tokens, visible):
    attention = make_transformer().blocks[0].attention
    query, key, value = attention.qkv(tokens).view(2, 9, 3, 4, 4).permute(2, 0, 3, 1, 4)
    mixed = scaled_dot_product_attention(query, key, value, attn_mask=visible)
    expected = attention.out(mixed.transpose(1, 2).reshape(2, 9, 16))
    torch.testing.assert_close(attention(tokens, visible), expected)
