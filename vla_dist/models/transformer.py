"""Pre-norm GPT blocks over any token sequence; who may see whom is decided by the caller's mask.

Shapes: B batch, L tokens, R tokens that are read, D width, N heads.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu, linear, scaled_dot_product_attention

from vla_dist.core.errors import ConfigError
from vla_dist.models.settings import require_heads

ACTIVATIONS = {"gelu": gelu, "relu": torch.relu_}
"""Of a tensor that nobody else holds: ``relu`` writes into it, which saves the largest array of a block."""
_LEVELS = 2**16
_LOWEST = -(2**63)


class SelfAttention(nn.Module):
    """Multi-head attention with one fused projection."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        require_heads("the width", dim, num_heads)
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = ResidualLinear(dim, dim)

    def forward(self, tokens: Tensor, bias: Tensor, *, read: slice | None = None) -> Tensor:
        """Mix the tokens that each asking token may look at.

        Args:
            tokens: (B, L, D).
            bias: (B or 1, 1, R, L), see ``attention_bias``.
            read: which R of the L tokens ask; None: all.

        Returns:
            (B, R, D).
        """
        if self.num_heads == 1:
            return self._single_head(tokens, bias, read)
        dim = tokens.shape[2]
        if read is None:
            query, key, value = self.qkv(tokens).split(dim, -1)
        else:
            query = linear(tokens[:, read], self.qkv.weight[:dim], self.qkv.bias[:dim])
            key, value = linear(tokens, self.qkv.weight[dim:], self.qkv.bias[dim:]).split(dim, -1)
        query, key, value = (self._heads(part) for part in (query, key, value))
        mixed = self._mixed(query, key, value, bias)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _single_head(self, tokens: Tensor, bias: Tensor, read: slice | None) -> Tensor:
        """With one head keys and values are the tokens themselves, so that nothing is projected for them."""
        weights = folded_head(self.qkv, self.out)
        query = linear(tokens if read is None else tokens[:, read], weights.query, weights.query_bias)
        if not (self.training and self.dropout):
            content, mask = tokens[:, None], bias.to(query.dtype)
            mixed = scaled_dot_product_attention(query[:, None], content, content, attn_mask=mask, scale=1.0)[:, 0]
            return linear(mixed, weights.out, weights.out_bias + weights.value_bias)
        scores = torch.baddbmm(bias[:, 0], query, tokens.transpose(1, 2))
        chosen = _dropped(scores.softmax(-1), self.dropout)
        mixed = linear(torch.bmm(chosen, tokens), weights.out, weights.out_bias)
        # Dropout makes a token's weights add up to something else than one.
        return torch.addcmul(mixed, chosen.sum(-1, keepdim=True), weights.value_bias)

    def _mixed(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """(B, N, R, D / N)."""
        dropout, bias = self.dropout if self.training else 0.0, bias.to(query.dtype)
        if not dropout or query.is_cuda:
            return scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
        # On a CPU there is no fused form with dropout.
        scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(2, 3)) + bias
        return torch.matmul(_dropped(scores.softmax(-1), dropout), value)

    def _heads(self, tokens: Tensor) -> Tensor:
        """(B, L, D) to (B, N, L, D / N), without a copy."""
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class FoldedHead(NamedTuple):
    """Attention of one head over plain tokens: softmax((Q x + q) . y) y, then O and its biases."""

    query: Tensor
    """(D, D), with the scale of the scores."""
    query_bias: Tensor
    """(D,)."""
    out: Tensor
    """(D, D)."""
    out_bias: Tensor
    """(D,)."""
    value_bias: Tensor
    """(D,), times the sum of a token's weights."""


def folded_head(qkv: nn.Linear, out: nn.Linear) -> FoldedHead:
    """The projections of one head in pairs, since they act in pairs alone.

    (W_q x + b_q) . (W_k y + b_k) is (W_k' W_q x + W_k' b_q) . y and a term without y, which cancels in the softmax;
    W_o of a weighted mean of W_v y + b_v is W_o W_v of the mean of y, and W_o b_v. The scores' scale goes into W_k.
    """
    query, key, value = qkv.weight.chunk(3)
    query_bias, _, value_bias = qkv.bias.chunk(3)
    key = key * len(key) ** -0.5
    return FoldedHead(
        query=key.t() @ query,
        query_bias=(query_bias[None] @ key)[0],
        out=out.weight @ value,
        out_bias=out.bias,
        value_bias=(value_bias[None] @ out.weight.t())[0],
    )


class ResidualLinear(nn.Linear):
    """Its output is added to the residual stream; see ``residual_gain``."""


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, dim: int, num_heads: int, inner_dim: int, activation: str, dropout: float, eps: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, eps=eps)
        self.attention = SelfAttention(dim, num_heads, dropout)
        self.mlp_norm = nn.LayerNorm(dim, eps=eps)
        self.widen = nn.Linear(dim, inner_dim)
        self.narrow = ResidualLinear(inner_dim, dim)
        self.activation = ACTIVATIONS[activation]
        self.dropout = Dropout(dropout)

    def forward(self, tokens: Tensor, bias: Tensor, *, read: slice | None = None) -> Tensor:
        """(B, L, D) to (B, R, D); the arguments are SelfAttention's."""
        mixed = self.attention(self.attention_norm(tokens), bias, read=read)
        tokens = (tokens if read is None else tokens[:, read]) + self.dropout(mixed)
        # Flat, as what is written into must be no view: autograd would copy the whole of it four times.
        hidden = self.activation(self.widen(self.mlp_norm(tokens).flatten(0, 1)))
        return tokens + self.dropout(self.narrow(hidden).view_as(tokens))


class Transformer(nn.Module):
    """A stack of blocks and a final LayerNorm."""

    def __init__(
        self,
        *,
        dim: int,
        num_layers: int,
        num_heads: int,
        inner_dim: int,
        activation: str = "gelu",
        dropout: float = 0.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ConfigError(f"activation {activation!r} must be one of {', '.join(ACTIVATIONS)}")
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, inner_dim, activation, dropout, eps) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, tokens: Tensor, visible: Tensor, *, read: slice | None = None) -> Tensor:
        """Tokens after every block.

        Args:
            tokens: (B, L, D).
            visible: (B or 1, 1, L, L) bool, True where the row may look at the column.
            read: which R of the L tokens are wanted: the last block computes no others. None: all.

        Returns:
            (B, R, D).
        """
        tokens, bias = self.dropout(tokens), attention_bias(visible, tokens.dtype)
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            if index == last and read is not None:
                tokens = block(tokens, bias[:, :, read], read=read)
            else:
                tokens = block(tokens, bias)
        return self.norm(tokens)


class Dropout(nn.Module):
    """nn.Dropout at a fraction of its cost on a CPU: one 64-bit random number decides for four entries.

    The probability is rounded to a multiple of 2**-16; what is kept is scaled by the rounded one, so that the mean is
    exact.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ConfigError(f"dropout {p} must be within [0, 1)")
        self.p = p

    def forward(self, tokens: Tensor) -> Tensor:
        return _dropped(tokens, self.p) if self.training and self.p else tokens


def _dropped(tokens: Tensor, p: float) -> Tensor:
    if tokens.is_cuda:
        return dropout(tokens, p)
    hidden = round(p * _LEVELS)
    words = torch.empty((tokens.numel() + 3) // 4, dtype=torch.int64, device=tokens.device).random_(_LOWEST, None)
    lots = words.view(torch.int16)[: tokens.numel()].view(tokens.shape)
    return tokens * (lots >= hidden - _LEVELS // 2).to(tokens.dtype).mul_(_LEVELS / (_LEVELS - hidden))


def attention_bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of attention: 0 where a bool mask is True, minus infinity elsewhere.

    Each layer would make it of the mask by itself.
    """
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -math.inf)


def causal_visibility(is_key: Tensor) -> Tensor:
    """(B, L) bool, True where a token may be looked at, to a causal (B or 1, 1, L, L) mask.

    Every token sees itself, whatever ``is_key`` says: a softmax over nothing would be NaN.
    """
    length = is_key.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=is_key.device).tril()
    # One mask for all rows is smaller; on a GPU, looking whether it will do would wait for it.
    if is_key.device.type == "cpu" and not torch.compiler.is_compiling() and is_key.all():
        return earlier[None, None]
    itself = torch.eye(length, dtype=torch.bool, device=is_key.device)
    return ((earlier & is_key[:, None, :]) | itself)[:, None]


def residual_gain(num_layers: int) -> float:
    """Shrinks what each of the 2 x num_layers residual branches adds at the start.

    Source: Radford et al. 2019 (GPT-2), section 2.3.
    """
    return 1.0 / math.sqrt(2 * max(1, num_layers))
