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


def log_likelihood(
    explained: Tensor, stop_logits: Tensor, sketches: Sketches, padding_mask: Tensor, begins: Tensor
) -> Tensor:
    """(B,) log of the sum, over all monotone alignments, of what each makes of the window.

    Args:
        explained: (B, K, N) log likelihood of each step's action under each skill of the sketch.
        stop_logits: (B, K, N) that the skill had ended before this step.
        padding_mask: (B, K) bool, padding on the left.
        begins: (B,) bool, the window holds the episode's first step, so that it starts with the first skill; elsewhere
            it may start with any.
    """
    stop, go_on = torch.nn.functional.logsigmoid(stop_logits), torch.nn.functional.logsigmoid(-stop_logits)
    exists = sketches.exists
    first = torch.arange(exists.shape[1], device=exists.device) == 0
    start = torch.where(begins[:, None], torch.where(first, 0.0, _IMPOSSIBLE), -sketches.lengths.log()[:, None])
    start = torch.where(exists, start, _IMPOSSIBLE)
    scores = start
    for step in range(explained.shape[1]):
        stayed = scores + go_on[:, step]
        moved = torch.nn.functional.pad((scores + stop[:, step])[:, :-1], (1, 0), value=_IMPOSSIBLE)
        runs_on = padding_mask[:, step - 1] if step else torch.zeros_like(begins)
        arrived = torch.where(runs_on[:, None], torch.logaddexp(stayed, moved), start)
        now = torch.where(exists, arrived + explained[:, step], _IMPOSSIBLE)
        scores = torch.where(padding_mask[:, step, None], now, scores)
    return torch.logsumexp(scores, 1)


def posterior(
    explained: Tensor, stop_logits: Tensor, sketches: Sketches, padding_mask: Tensor, begins: Tensor
) -> Tensor:
    """(B, K, N) probability that each skill was running at each step, given the whole window; 0 where padded.

    It is the gradient of the log likelihood by what each step contributes to it. Carries no gradient itself.
    """
    with torch.enable_grad():
        leaf = explained.detach().requires_grad_()
        total = log_likelihood(leaf, stop_logits.detach(), sketches, padding_mask, begins).sum()
        (running,) = torch.autograd.grad(total, leaf)
    return running * padding_mask[..., None]
