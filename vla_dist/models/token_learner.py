"""Many image tokens to a few, chosen by content.

Shapes: B batch, N image tokens, M learned tokens, D width.
"""

import torch
from torch import Tensor, nn


class TokenLearner(nn.Module):
    """Each learned token is a weighted mean over the image, with weights that an MLP gives to every place.

    Source: Ryoo et al. 2021, TokenLearner, section 2, in the form of the RT-1 code: LayerNorm, MLP with a bottleneck of
    64, softmax over places.
    """

    def __init__(self, dim: int, num_tokens: int, bottleneck: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.narrow = nn.Linear(dim, bottleneck)
        # Without a bias: added to every place alike it cancels in the softmax.
        self.choose = nn.Linear(bottleneck, num_tokens, bias=False)

    def weights(self, tokens: Tensor) -> Tensor:
        """(B, N, D) to (B, M, N): where each learned token looks; rows sum to one."""
        scores = self.choose(nn.functional.gelu(self.narrow(self.norm(tokens))))
        return scores.transpose(-1, -2).softmax(-1)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) to (B, M, D)."""
        return torch.matmul(self.weights(tokens), tokens)
