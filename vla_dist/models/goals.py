"""Instructions to goal vectors: a table first, the language model only for words outside it."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from vla_dist.core.errors import DataError
from vla_dist.core.types import Array

Embed = Callable[[Sequence[str]], Array]
"""B texts to (B, G) float32, the same vector for the same text whatever stands beside it."""


class GoalTable:
    """Holds the vectors of known instructions, so that a process which meets no other one loads no encoder."""

    def __init__(
        self,
        embed: Embed,
        *,
        instructions: Sequence[str] = (),
        embeddings: Array | None = None,
        capacity: int = 4096,
    ) -> None:
        """Args:
            embed: called for unknown instructions only; it keeps its own cache.
            instructions: N texts already embedded.
            embeddings: (N, G) float32, their vectors.
            capacity: ``remember`` keeps no more than this many.

        Raises:
            DataError: as many rows as texts are needed.
        """
        rows = np.zeros((0, 0), np.float32) if embeddings is None else np.asarray(embeddings, np.float32)
        if rows.ndim != 2 or len(rows) != len(instructions):
            raise DataError(f"goal embeddings of shape {rows.shape} must be ({len(instructions)}, G), a row a text")
        self._embed = embed
        self._capacity = capacity
        self._rows = dict(zip(instructions, rows, strict=True))

    def with_rows(self, instructions: Sequence[str], embeddings: Array) -> "GoalTable":
        """A table over the same encoder that holds these rows instead."""
        return GoalTable(self._embed, instructions=instructions, embeddings=embeddings, capacity=self._capacity)

    def lookup(self, instructions: Sequence[str]) -> Array:
        """B instructions to (B, G) float32. Unknown ones are embedded but not kept: robots may send any words."""
        found = self._rows
        unknown = list(dict.fromkeys(text for text in instructions if text not in found))
        if unknown:
            found = {**found, **self._embedded(unknown)}
        return np.stack([found[text] for text in instructions])

    def remember(self, instructions: Iterable[str]) -> None:
        """Embed those that are new and keep them while there is room; they travel with the policy."""
        unknown = [text for text in dict.fromkeys(instructions) if text not in self._rows]
        unknown = unknown[: max(0, self._capacity - len(self._rows))]
        if unknown:
            # A new dictionary, so that a reader in another thread sees either table whole.
            self._rows = {**self._rows, **self._embedded(unknown)}

    def _embedded(self, texts: list[str]) -> dict[str, Array]:
        vectors = np.asarray(self._embed(texts), np.float32)
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise DataError(
                f"the language encoder gave shape {vectors.shape} for {len(texts)} texts, expected a row each"
            )
        return dict(zip(texts, vectors, strict=True))

    def contents(self) -> tuple[tuple[str, ...], Array]:
        """The N texts and their (N, G) float32 vectors; (0, 0) while empty."""
        rows = self._rows
        return tuple(rows), np.stack(list(rows.values())) if rows else np.zeros((0, 0), np.float32)

    def nearest(self, text: str, candidates: Sequence[str]) -> str:
        """The candidate whose vector has the highest cosine with the text's, both centred on the candidates' mean."""
        vectors = self.lookup([text, *candidates])
        centred = vectors - vectors[1:].mean(0)
        unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-9)
        return candidates[int((unit[1:] @ unit[0]).argmax())]
