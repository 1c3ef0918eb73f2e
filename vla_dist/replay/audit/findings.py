"""What a check of a buffer found wrong, each with what would put it right."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from vla_dist.replay.wire import Command


@dataclass(frozen=True, slots=True, kw_only=True)
class Adjustment:
    """A counter that is off by so much: adding it is right even while others count on."""

    table: int | None
    """Index of a table, -1 for the buffer; None: of the counters by task and source."""
    counter: str
    amount: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong; without a remedy only a person can judge it."""

    where: str
    """An episode's id, a key or a counter."""
    what: str
    commands: Sequence[Command] = field(default=(), repr=False)
    """To the server of rows and metadata; harmless where the episode has left meanwhile."""
    image_commands: Sequence[Command] = field(default=(), repr=False)
    """To the server of the images."""
    adjustments: Sequence[Adjustment] = field(default=(), repr=False)
    discard: int | None = None
    """Completion of an episode to remove."""

    @property
    def has_remedy(self) -> bool:
        return bool(self.commands or self.image_commands or self.adjustments or self.discard is not None)

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"
