"""Pre-norm GPT blocks over any token sequence; who may see whom is decided by the caller's mask.

Shapes: B batch, L tokens, D width, N heads.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu, scaled_dot_product_attention

from vla_dist.core.errors import ConfigError

ACTIVATIONS = {"gelu": gelu, "relu": relu}


class SelfAttention(nn.Module):
    """Multi-head attention with one fused projection."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        if dim % num_heads:
            raise ConfigError(f"{num_heads} heads do not divide the width {dim}; choose a multiple")
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """(B, L, D) tokens and (B, 1, L, L) bool, True where the row may look at the column, to (B, L, D)."""
        batch, length, dim = tokens.shape
        heads = self.qkv(tokens).view(batch, length, 3, self.num_heads, dim // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout if self.training else 0.0
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=visible, dropout_p=dropout)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, dim))


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, dim: int, num_heads: int, inner_dim: int, activation: str, dropout: float, eps: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, eps=eps)
        self.attention = SelfAttention(dim, num_heads, dropout)
        self.mlp_norm = nn.LayerNorm(dim, eps=eps)
        self.widen = nn.Linear(dim, inner_dim)
        self.narrow = nn.Linear(inner_dim, dim)
        self.activation = ACTIVATIONS[activation]
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, visible: Tensor) -> Tensor:
        tokens = tokens + self.dropout(self.attention(self.attention_norm(tokens), visible))
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
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, inner_dim, activation, dropout, eps) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, tokens: Tensor, visible: Tensor) -> Tensor:
        tokens = self.dropout(tokens)
        for block in self.blocks:
            tokens = block(tokens, visible)
        return self.norm(tokens)


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
