"""Pre-norm GPT blocks over any token sequence; who may see whom is decided by the caller's mask.

Shapes: B batch, L new tokens, C tokens with those before them, R tokens that are read, D width, N heads.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu, linear, scaled_dot_product_attention

from vla_dist.core.errors import ConfigError

ACTIVATIONS = {"gelu": gelu, "relu": torch.relu_}
"""Of a tensor that nobody else holds: ``relu`` writes into it, which saves the largest array of a block."""
_LEVELS = 2**16
_LOWEST = -(2**63)


class SelfAttention(nn.Module):
    """Multi-head attention with one fused projection."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        if dim % num_heads:
            raise ConfigError(f"{num_heads} heads do not divide the width {dim}; choose a multiple")
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = ResidualLinear(dim, dim)

    def forward(
        self, tokens: Tensor, visible: Tensor, *, read: slice | None = None, cache: Tensor | None = None
    ) -> Tensor:
        """Mix the tokens that each asking token may look at.

        Args:
            tokens: (B, L, D).
            visible: (B or 1, 1, R, C) bool, True where the asking token may look at the column.
            read: which R of the L tokens ask; None: all.
            cache: (2, B, C, D), keys and values of C tokens, the last L of them this call's, which are written here;
                None: C is L.

        Returns:
            (B, R, D).
        """
        dim = tokens.shape[2]
        if read is None:
            query, key, value = self.qkv(tokens).split(dim, -1)
        else:
            query = linear(tokens[:, read], self.qkv.weight[:dim], self.qkv.bias[:dim])
            key, value = linear(tokens, self.qkv.weight[dim:], self.qkv.bias[dim:]).split(dim, -1)
        if cache is not None:
            length = tokens.shape[1]
            cache[0, :, -length:], cache[1, :, -length:] = key, value
            key, value = cache[0], cache[1]
        query, key, value = (self._heads(part) for part in (query, key, value))
        if self.training and self.dropout and not query.is_cuda:
            mixed = _attention_with_dropout(query, key, value, visible, self.dropout)
        else:
            dropout = self.dropout if self.training else 0.0
            mixed = scaled_dot_product_attention(query, key, value, attn_mask=visible, dropout_p=dropout)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _heads(self, tokens: Tensor) -> Tensor:
        """(B, L, D) to (B, N, L, D / N), without a copy."""
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


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

    def forward(
        self, tokens: Tensor, visible: Tensor, *, read: slice | None = None, cache: Tensor | None = None
    ) -> Tensor:
        """(B, L, D) to (B, R, D); the arguments are SelfAttention's."""
        mixed = self.attention(self.attention_norm(tokens), visible, read=read, cache=cache)
        tokens = (tokens if read is None else tokens[:, read]) + self.dropout(mixed)
        return tokens + self.dropout(self.narrow(self.activation(self.widen(self.mlp_norm(tokens)))))


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

    def forward(
        self, tokens: Tensor, visible: Tensor, *, read: slice | None = None, cache: Tensor | None = None
    ) -> Tensor:
        """Tokens after every block.

        Args:
            tokens: (B, L, D), the newest ones.
            visible: (B or 1, 1, L, C) bool, True where the row may look at the column.
            read: which R of the L tokens are wanted: the last block computes no others. None: all.
            cache: (num_layers, 2, B, C, D), keys and values of the C tokens so far, the last L of them written by this
                call; None: there are no others, C is L.

        Returns:
            (B, R, D).
        """
        tokens = self.dropout(tokens)
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            past = None if cache is None else cache[index]
            if index == last and read is not None:
                tokens = block(tokens, visible[:, :, read], read=read, cache=past)
            else:
                tokens = block(tokens, visible, cache=past)
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


def _attention_with_dropout(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, p: float) -> Tensor:
    """(B, N, R, D / N): what scaled_dot_product_attention computes; on a CPU it has no fused form with dropout."""
    bias = torch.zeros(visible.shape, dtype=query.dtype, device=query.device).masked_fill_(~visible, -math.inf)
    scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(2, 3)) + bias
    return torch.matmul(_dropped(scores.softmax(-1), p), value)


def causal_visibility(is_key: Tensor) -> Tensor:
    """(B, L) bool, True where a token may be looked at, to a causal (B, 1, L, L) mask.

    Every token sees itself, whatever ``is_key`` says: a softmax over nothing would be NaN.
    """
    length = is_key.shape[1]
    ones = torch.ones(length, length, dtype=torch.bool, device=is_key.device)
    itself = torch.eye(length, dtype=torch.bool, device=is_key.device)
    return ((ones.tril() & is_key[:, None, :]) | itself)[:, None]


def residual_gain(num_layers: int) -> float:
    """Shrinks what each of the 2 x num_layers residual branches adds at the start.

    Source: Radford et al. 2019 (GPT-2), section 2.3.
    """
    return 1.0 / math.sqrt(2 * max(1, num_layers))
