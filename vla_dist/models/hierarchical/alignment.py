"""Which skill of a sketch was running at each step: nobody stored it, so all monotone alignments are weighed.

A sketch is the order of skills that an episode's task or words name. Where one skill changes to the next is latent; how
well each skill's controller explains the recorded action, and where its termination fires, make some changes likelier.

Source: Shiarlis et al. 2018, "TACO: Learning Task Decomposition via Temporal Alignment for Control", section 4.

Shapes: B windows, K steps, N skills of the longest sketch, S skills of the vocabulary.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vla_dist.core.errors import DataError
from vla_dist.models.clauses import clauses_of

_IMPOSSIBLE = -1e9
_ARTICLES = re.compile(r"\b(?:a|an|the)\s+", re.IGNORECASE)


def sketch_of(task: str, instruction: str, skills: Sequence[str]) -> tuple[int, ...]:
    """The skills that a task names, in the order of execution, as indices of the vocabulary.

    Looked for in this order: the task is a skill; its clauses are (``+`` joins them); the words are one; their clauses
    are. Articles do not matter.

    Raises:
        DataError: neither the task nor the words are made of known skills.
    """
    known = {_plain(skill): index for index, skill in enumerate(skills)}
    for text in (task, instruction):
        if _plain(text) in known:
            return (known[_plain(text)],)
        parts = [_plain(clause) for clause in clauses_of(text)]
        if parts and all(part in known for part in parts):
            return tuple(known[part] for part in parts)
    raise DataError(
        f"neither task {task!r} nor its words {instruction!r} are made of the skills {', '.join(skills)}; add the "
        "missing ones to the config's skills"
    )


def _plain(text: str) -> str:
    return _ARTICLES.sub("", text).strip().lower()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sketches:
    """B sketches, padded to the longest."""

    skills: Tensor
    """(B, N) int64; padding repeats the last skill."""
    lengths: Tensor
    """(B,) int64, at least 1."""

    @classmethod
    def of(
        cls, tasks: Sequence[str], instructions: Sequence[str], skills: Sequence[str], device: torch.device
    ) -> "Sketches":
        """Raises DataError where a window names no known skill."""
        rows = [sketch_of(task, words, skills) for task, words in zip(tasks, instructions, strict=True)]
        longest = max(map(len, rows))
        padded = [[*row, *[row[-1]] * (longest - len(row))] for row in rows]
        return cls(
            skills=torch.tensor(padded, device=device), lengths=torch.tensor([len(row) for row in rows], device=device)
        )

    @property
    def exists(self) -> Tensor:
        """(B, N) bool."""
        return torch.arange(self.skills.shape[1], device=self.lengths.device) < self.lengths[:, None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Surroundings:
    """What is known of the skills at the ends of a window by what lies outside of it; log weights."""

    first: Tensor
    """(B, N) that the window's first step belongs to each skill."""
    last: Tensor
    """(B, N) of what comes after the window, where its last step belongs to each skill."""

    @classmethod
    def of_windows(cls, sketches: Sketches, begins: Tensor) -> "Surroundings":
        """Args:
        begins: (B,) bool, the window holds the episode's first step, so that it starts with the first skill; elsewhere
            it may start with any, and may end with any.
        """
        exists = sketches.exists
        is_first = torch.arange(exists.shape[1], device=exists.device) == 0
        any_skill = -sketches.lengths.log()[:, None].expand(exists.shape)
        first = torch.where(begins[:, None], torch.where(is_first, 0.0, _IMPOSSIBLE), any_skill)
        return cls(first=torch.where(exists, first, _IMPOSSIBLE), last=torch.zeros_like(first))

    @classmethod
    def of_episodes(
        cls, sketches: Sketches, padding_mask: Tensor, steps_before: Tensor, steps_after: Tensor, success: Tensor
    ) -> "Surroundings":
        """An episode begins with the first skill and, where it succeeded, ends with the last.

        Of the steps outside of the window nothing else is known, so all ways to change skills there are equally likely:
        as many changes as a skill is away from an end, among as many steps, each a change with the same chance.

        Args:
            padding_mask: (B, K) bool.
            steps_before: (B,) int64, of the episode before the window.
            steps_after: (B,) int64, after it.
            success: (B,) bool; an episode that failed may end with any skill. So may one that has fewer steps than
                skills, some of which were fulfilled from the beginning.
        """
        exists, index = sketches.exists, torch.arange(sketches.skills.shape[1], device=success.device)
        within = sketches.lengths[:, None] - 1
        steps = steps_before + padding_mask.sum(1) + steps_after
        chance = (within / (steps[:, None] - 1).clamp(min=1)).clamp(1e-3, 1.0 - 1e-3)
        first = _log_binomial(index.expand(exists.shape), steps_before[:, None], chance)
        last = _log_binomial(within - index, steps_after[:, None], chance)
        last = torch.where((success & (steps >= sketches.lengths))[:, None], last, 0.0)
        return cls(first=torch.where(exists, first, _IMPOSSIBLE), last=torch.where(exists, last, _IMPOSSIBLE))


def _log_binomial(hits: Tensor, trials: Tensor, chance: Tensor) -> Tensor:
    """Log probability of so many hits, all broadcast; next to none where there are more hits than trials."""
    misses = (trials - hits).clamp(min=0)
    some, every = hits.clamp(min=0), trials.clamp(min=0).to(chance.dtype)
    ways = torch.lgamma(every + 1) - torch.lgamma(some + 1.0) - torch.lgamma(misses + 1.0)
    value = ways + some * chance.log() + misses * torch.log1p(-chance)
    return torch.where((hits >= 0) & (hits <= trials), value, _IMPOSSIBLE)


def log_likelihood(
    explained: Tensor, stop_logits: Tensor, sketches: Sketches, padding_mask: Tensor, around: Surroundings
) -> Tensor:
    """(B,) log of the sum, over all monotone alignments, of what each makes of the window.

    Args:
        explained: (B, K, N) log likelihood of each step's action under each skill of the sketch.
        stop_logits: (B, K, N) that the skill had ended before this step.
        padding_mask: (B, K) bool, padding on the left.
        around: what is known of the skills at the window's ends.
    """
    stop, go_on = torch.nn.functional.logsigmoid(stop_logits), torch.nn.functional.logsigmoid(-stop_logits)
    exists = sketches.exists
    scores = start = around.first
    for step in range(explained.shape[1]):
        stayed = scores + go_on[:, step]
        moved = torch.nn.functional.pad((scores + stop[:, step])[:, :-1], (1, 0), value=_IMPOSSIBLE)
        runs_on = padding_mask[:, step - 1] if step else torch.zeros_like(padding_mask[:, 0])
        arrived = torch.where(runs_on[:, None], torch.logaddexp(stayed, moved), start)
        now = torch.where(exists, arrived + explained[:, step], _IMPOSSIBLE)
        scores = torch.where(padding_mask[:, step, None], now, scores)
    return torch.logsumexp(scores + around.last, 1)


def posterior(
    explained: Tensor, stop_logits: Tensor, sketches: Sketches, padding_mask: Tensor, around: Surroundings
) -> Tensor:
    """(B, K, N) probability that each skill was running at each step, given the whole window; 0 where padded.

    It is the gradient of the log likelihood by what each step contributes to it. Carries no gradient itself.
    """
    with torch.enable_grad():
        leaf = explained.detach().requires_grad_()
        total = log_likelihood(leaf, stop_logits.detach(), sketches, padding_mask, around).sum()
        (running,) = torch.autograd.grad(total, leaf)
    return running * padding_mask[..., None]
