"""The clauses of an instruction, in the order in which they are to be carried out, and their vectors side by side.

Shapes: B texts, E numbers of a sentence embedding, M clauses, G = M * E.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from vla_dist.core.errors import ConfigError
from vla_dist.core.types import Array
from vla_dist.models.goals import Embed

_JOINTS = re.compile(r",?\s+(?:and\s+then|then|and)\s+|\s*[,;+]\s*", re.IGNORECASE)
_AFTER = re.compile(r"^(?P<later>.+?),?\s+after\s+you\s+(?P<first>.+)$", re.IGNORECASE)


def clauses_of(text: str) -> tuple[str, ...]:
    """Parts joined by "and", "then", a comma, a semicolon or ``+``; "X after you Y" is Y, then X. () of no words."""
    after = _AFTER.match(text)
    halves = [after["first"], after["later"]] if after else [text]
    return tuple(part.strip() for half in halves for part in _JOINTS.split(half) if part.strip())


def by_clause(embed: Embed, num_clauses: int) -> Embed:
    """Texts to (B, G): each clause embedded by itself, zeros where there are fewer.

    One vector of a whole sentence hardly tells which clause comes first, and a sentence of known clauses in a new order
    lies nowhere near a known one. Of more than M clauses the last vector is that of all that are left.
    """
    if num_clauses == 1:
        return embed

    def embed_clauses(texts: Sequence[str]) -> Array:
        rows = [_at_most(clauses_of(text), num_clauses) for text in texts]
        distinct = list(dict.fromkeys(clause for row in rows for clause in row)) or [""]
        vectors = dict(zip(distinct, np.asarray(embed(distinct), np.float32), strict=True))
        width = len(vectors[distinct[0]])
        found = np.zeros((len(texts), num_clauses, width), np.float32)
        for place, row in enumerate(rows):
            for number, clause in enumerate(row):
                found[place, number] = vectors[clause]
        return found.reshape(len(texts), num_clauses * width)

    return embed_clauses


def goal_embed(embed: Embed, config: Any) -> Embed:
    """As a member's goals are embedded: clause by clause where its config has ``goal_clauses``."""
    return by_clause(embed, getattr(config, "goal_clauses", 1))


def require_clauses(goal_dim: int, num_clauses: int) -> None:
    """Raises ConfigError where that many vectors do not make up a goal."""
    if num_clauses < 1 or goal_dim % num_clauses or (num_clauses > 1 and not goal_dim):
        raise ConfigError(
            f"goal_clauses {num_clauses} must be at least 1 and divide goal_dim {goal_dim}, which holds one sentence "
            "embedding after another: 2 clauses of 384 numbers need goal_dim 768"
        )


def _at_most(clauses: tuple[str, ...], num: int) -> tuple[str, ...]:
    return clauses if len(clauses) <= num else (*clauses[: num - 1], ", then ".join(clauses[num - 1 :]))
