"""What a learning benchmark is run with.

Each module beside this one is a benchmark, named after its file with dashes for underscores. It has two functions::

    def run(settings: Settings) -> dict      # plain JSON, as ``learn_parts.results.answer`` makes it
    def figure(result: dict, path: Path)     # a PNG of one such answer
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How often, how long and where."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Each is a data set, an initialisation and a suite of evaluation episodes of its own."""
    quick: bool = False
    """A form of under a minute that shows that everything runs, and claims nothing."""
    in_process: bool = False
    """The same parts stepped one after another in this process, instead of by Ray."""
    work_dir: Path = Path("runs/learn")
    """Finished seeds are kept there and not run again."""
    earlier: Path | None = None
    """An earlier answer, if there is one: its seeds of the same protocol are not run again either."""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds {self.seeds} must be one or more different numbers of at least 0")
