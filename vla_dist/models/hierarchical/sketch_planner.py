"""A planner that reads what is to be done once, clause by clause, and leaves it to the skills to say when each is over.

It looks at words alone, so clauses that it knows make up an order that it was never shown; a planner that looks at the
robot learns each order by itself. Where a skill has ended wrongly it does not begin it again.

Source: Andreas et al. 2017, "Modular Multitask Reinforcement Learning with Policy Sketches", section 4; Shiarlis et al.
2018, TACO, section 4, whose policies run one after the other by their own stopping. There the sketch is given; here it
is read.

Shapes: B windows, M clauses, E numbers of a clause's vector, G = M * E, S skills, N skills of the longest sketch.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vla_dist.core.errors import DataError
from vla_dist.models.hierarchical.alignment import Sketches
from vla_dist.models.hierarchical.config import HierarchicalVLAConfig
from vla_dist.models.scales import InputScales


class SketchPlanner(nn.Module):
    """(B, G) clause vectors to the skill that each clause names."""

    context_steps = 1

    def __init__(self, config: HierarchicalVLAConfig) -> None:
        super().__init__()
        self.num_clauses = config.goal_clauses
        width = config.goal_dim // config.goal_clauses
        self.encoder = InputScales()
        self.encoder.register_scales(config.state_dim, config.goal_dim)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(config.skills or ()))

    def forward(self, goals: Tensor) -> Tensor:
        """(B, G) to (B, M, S) logits."""
        return self.head(self.norm(goals.unflatten(-1, (self.num_clauses, -1))))

    def count(self, goals: Tensor) -> Tensor:
        """(B, G) to (B,) int64: how many clauses were said."""
        return (goals.unflatten(-1, (self.num_clauses, -1)) != 0).any(-1).sum(-1)

    def read(self, goals: Tensor) -> list[tuple[int, ...]]:
        """(B, G) to the skills of each row in their order, at least one."""
        skills, counts = self(goals).argmax(-1).tolist(), self.count(goals).tolist()
        return [tuple(row[: max(1, count)]) for row, count in zip(skills, counts, strict=True)]

    def errors(self, goals: Tensor, sketches: Sketches) -> tuple[Tensor, Tensor, Tensor]:
        """(B,) cross-entropy of a window's clauses, (B,) share of them that is read rightly, and (B,) bool, which
        windows have as many clauses as their sketch has skills: of others nobody knows which clause names what.

        Raises:
            DataError: a sketch has more skills than there are clauses, so that it could never be read.
        """
        if sketches.skills.shape[1] > self.num_clauses:
            raise DataError(
                f"a task names {sketches.skills.shape[1]} skills in a row and the planner reads {self.num_clauses} "
                "clauses; give the config a larger goal_clauses, and goal_dim with it"
            )
        size = sketches.skills.shape[1]
        labels, exists = sketches.skills[:, :size], sketches.exists[:, :size]
        logits = self(goals)[:, :size]
        errors = cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        right = (logits.argmax(-1) == labels).float()
        count = exists.sum(1)
        mean = torch.stack([(value * exists).sum(1) / count for value in (errors, right)])
        return mean[0], mean[1], self.count(goals) == sketches.lengths
