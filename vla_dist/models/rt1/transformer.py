"""RT-1's decoder: pre-norm attention whose heads are wider than their share of the model, then one dense layer.

Source: Brohan et al. 2022, RT-1, section 5.1, and its published code: 8 layers, key size 128, no widening MLP.

Shapes: B batch, L tokens, D width, N heads, K head width.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class WideAttention(nn.Module):
    """Multi-head attention with N x K independent of D."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * num_heads * head_dim)
        self.out = nn.Linear(num_heads * head_dim, dim)

    def forward(self, tokens: Tensor, bias: Tensor) -> Tensor:
        """(B, L, D) tokens and (B, 1, L, L) from ``attention_bias``, to (B, L, D)."""
        heads: Any = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout if self.training else 0.0
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype), dropout_p=dropout)
        return self.out(mixed.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + dense(norm(x))."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = WideAttention(dim, num_heads, head_dim, dropout)
        self.dense_norm = nn.LayerNorm(dim)
        self.dense = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, bias: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.attention_norm(tokens), bias)
        return tokens + self.dropout(self.dense(self.dense_norm(tokens)))
