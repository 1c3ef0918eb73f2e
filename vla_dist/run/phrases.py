"""The words that a run says to its robots."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from vla_dist.envs.instructions import WORDED_TASKS, Split, instruction_for, phrases
from vla_dist.run.config import RunConfig

if TYPE_CHECKING:
    from vla_dist.evaluation.suite import PhraseSource


def phrase_source(config: RunConfig, split: Split) -> PhraseSource:
    """The words of a task; None where the environment words its own missions."""
    return partial(_phrase, split) if _has_phrases(config) else _own_words


def training_phrases(config: RunConfig) -> dict[str, tuple[str, ...]]:
    """Task -> its words; empty where the environment words its own missions."""
    return {task: phrases(task, "training") for task in config.env.tasks} if _has_phrases(config) else {}


def _has_phrases(config: RunConfig) -> bool:
    return all(task in WORDED_TASKS for task in config.env.tasks)


def _phrase(split: Split, task: str, seed: int) -> str:
    return instruction_for(task, seed, split)


def _own_words(task: str, seed: int) -> None:
    return None
