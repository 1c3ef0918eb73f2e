"""An episode's memory: a bank of slots, what is written into it and what attention reads from it.

Shapes: B rows, M slots, D width, N heads, F time features.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vla_dist.core.errors import DataError
from vla_dist.models.settings import require_heads

_SAME_STRENGTH = 1e-3
_SAME_ENTRY = 1e-2
"""Relative distance below which an entry is what a slot already holds."""
_TIME_FEATURES = 8
# Temperature and stretch of the hard concrete distribution, the values of its paper, section 4.
_TEMPERATURE, _BELOW, _ABOVE = 2 / 3, -0.1, 1.1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EpisodicMemory:
    """B banks, one for each running episode; a new one is made instead of changing it."""

    contents: Tensor
    """(B, M, D); zeros where nothing was written."""
    strengths: Tensor
    """(B, M) within 0..1, how firmly each slot was written: attention is drawn by it, and the weakest slot makes room.
    """
    ages: Tensor
    """(B, M) float32, steps since each slot was written."""
    valid: Tensor
    """(B, M) bool, something was written."""

    @classmethod
    def empty(cls, num_rows: int, size: int, dim: int, *, like: Tensor) -> "EpisodicMemory":
        """Nothing remembered yet; ``like`` gives type and device."""
        return cls(
            contents=like.new_zeros(num_rows, size, dim),
            strengths=like.new_zeros(num_rows, size),
            ages=like.new_zeros(num_rows, size, dtype=torch.float32),
            valid=like.new_zeros(num_rows, size, dtype=torch.bool),
        )

    def written(self, entries: Tensor, strengths: Tensor, happened: Tensor) -> "EpisodicMemory":
        """The memory one step later.

        Each row takes its entry into the slot that already holds the same, which is thereby renewed and never weakened;
        else into the first empty one; else in place of the weakest, the oldest of these. So a thousand equal steps take
        one slot.

        Source: the renewal is that of Pritzel et al. 2017, "Neural Episodic Control", section 3.

        Args:
            entries: (B, D).
            strengths: (B,) within 0..1; 0 is not written.
            happened: (B,) bool; elsewhere the step is padding and neither content nor age changes.
        """
        weakest = torch.where(self.valid, self.strengths, -1.0)
        is_candidate = weakest <= weakest.amin(1, keepdim=True) + _SAME_STRENGTH
        with torch.no_grad():
            distances = torch.where(self.valid, (self.contents - entries[:, None]).norm(dim=-1), torch.inf)
            nearest, held_in = distances.min(1)
            is_held = nearest < _SAME_ENTRY * entries.norm(dim=-1)
        slot = torch.where(is_held, held_in, torch.where(is_candidate, self.ages, -1.0).argmax(1))
        chosen = nn.functional.one_hot(slot, self.ages.shape[1]).bool() & (happened & (strengths > 0))[:, None]
        given = strengths[:, None].to(self.strengths.dtype)
        firmness = torch.where(is_held[:, None], torch.maximum(given, self.strengths), given)
        ages = torch.where(self.valid & happened[:, None], self.ages + 1.0, self.ages)
        return EpisodicMemory(
            contents=torch.where(chosen[..., None], entries[:, None].to(self.contents.dtype), self.contents),
            strengths=torch.where(chosen, firmness, self.strengths),
            ages=torch.where(chosen, 1.0, ages),
            valid=self.valid | chosen,
        )

    def reset(self, rows: Tensor) -> "EpisodicMemory":
        """The same memory with the (B,) bool rows forgotten: their episode is over, the others' is not."""
        kept = ~rows[:, None]
        return EpisodicMemory(
            contents=self.contents * kept[..., None],
            strengths=self.strengths * kept,
            ages=self.ages * kept,
            valid=self.valid & kept,
        )

    def detach(self) -> "EpisodicMemory":
        """The same numbers without their history: where backpropagation through time is cut."""
        return EpisodicMemory(
            contents=self.contents.detach(), strengths=self.strengths.detach(), ages=self.ages, valid=self.valid
        )


class WriteGate(nn.Module):
    """How firmly each step is written, exactly 0 (not at all) and exactly 1 included.

    In training the strength is drawn, so that what is written half-heartedly gets lost half of the time: whatever is
    needed later must be written firmly, and a small cost drives everything else to 0, where it takes no slot.

    Source: Louizos et al. 2018, "Learning Sparse Neural Networks through L0 Regularization", equations 10 to 12: the
    hard concrete distribution.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.log_odds = nn.Linear(dim, 1)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(..., D) to strengths (...) within 0..1 and (...) probabilities that they are not 0; float32."""
        log_odds = self.log_odds(hidden).squeeze(-1).float()
        noise = torch.zeros_like(log_odds)
        if self.training:
            uniform = torch.rand_like(log_odds).clamp(1e-6, 1 - 1e-6)
            noise = uniform.logit()
        temperature = _TEMPERATURE if self.training else 1.0
        drawn = torch.sigmoid((log_odds + noise) / temperature) * (_ABOVE - _BELOW) + _BELOW
        return drawn.clamp(0, 1), torch.sigmoid(log_odds - _TEMPERATURE * math.log(-_BELOW / _ABOVE))


class MemoryReader(nn.Module):
    """Multi-head attention over the slots and one null slot, so that an empty memory can be read and others declined.

    A slot's logit is its match with the query, plus what the query thinks of its age, plus the log of its strength:
    that is how the gate that wrote it learns. Keys and values are the contents themselves, so that a step does not
    project all M slots.

    Source: content addressing as in Graves et al. 2014, "Neural Turing Machines", section 3.3.1; the scaled dot
    product of Vaswani et al. 2017, section 3.2.
    """

    def __init__(self, dim: int, num_heads: int, *, max_age: int) -> None:
        """Args:
        max_age: older slots count as this old. Ages that training never shows must not be met in a long episode.
        """
        super().__init__()
        require_heads("memory_dim", dim, num_heads)
        self.num_heads = num_heads
        self.max_age = max_age
        self.query = nn.Linear(dim, dim)
        self.time_query = nn.Linear(dim, num_heads * _TIME_FEATURES)
        self.null_key = nn.Parameter(torch.zeros(dim))
        self.null_value = nn.Parameter(torch.zeros(dim))
        self.out = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, memory: EpisodicMemory) -> tuple[Tensor, Tensor]:
        """(B, D) queries to what was read, (B, D), and the weights, (B, N, M + 1), the null slot first.

        Raises:
            DataError: the memory is of another size.
        """
        batch, dim = tokens.shape
        if memory.contents.shape[0] != batch or memory.contents.shape[2] != dim:
            raise DataError(
                f"a memory of shape {tuple(memory.contents.shape)} does not fit {batch} rows of width {dim}; "
                "start one with initial_memory"
            )
        heads, width = self.num_heads, dim // self.num_heads
        contents = memory.contents.to(tokens.dtype)
        slots = torch.cat([self.null_key.expand(batch, 1, dim), contents], 1).view(batch, -1, heads, width)
        values = torch.cat([self.null_value.expand(batch, 1, dim), contents], 1).view(batch, -1, heads, width)
        query = self.query(tokens).view(batch, heads, width)
        match = torch.einsum("bnd,bmnd->bnm", query, slots) / math.sqrt(width)
        time_query = self.time_query(tokens).view(batch, heads, _TIME_FEATURES)
        timing = torch.einsum("bnf,bmf->bnm", time_query, self._time_features(memory.ages).to(tokens.dtype))
        bias = memory.strengths.clamp_min(1e-6).log().to(tokens.dtype)[:, None] + timing
        bias = torch.where(memory.valid[:, None], bias, -torch.inf)
        logits = match + nn.functional.pad(bias, (1, 0))
        weights = torch.softmax(logits[:, :, None], -1)[:, :, 0]
        read = torch.einsum("bnm,bmnd->bnd", weights, values).reshape(batch, dim)
        return self.out(read), weights

    def _time_features(self, ages: Tensor) -> Tensor:
        """(B, M) to (B, M, F): sines and cosines of wavelengths from 2 pi to about 2 pi max_age."""
        count = _TIME_FEATURES // 2
        rates = self.max_age ** (-torch.arange(count, device=ages.device) / max(1, count - 1))
        angles = ages.clamp(max=self.max_age)[..., None] * rates
        return torch.cat([angles.sin(), angles.cos()], -1)
