"""Key-to-Door with ten times the random walks: see ``key_to_door.py``."""

from typing import Any

from learn import key_to_door
from learn.key_to_door import figure
from learn.settings import Settings

__all__ = ["figure", "run"]


def run(settings: Settings) -> dict[str, Any]:
    return key_to_door.run(settings, name="key-to-door-10k", size=10_000)
