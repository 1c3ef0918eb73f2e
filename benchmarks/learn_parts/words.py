"""Meta-World's tasks and those of the shared scene, judged with the right words, none, others and unheard ones."""

import dataclasses
from collections.abc import Sequence

from learn_parts.results import Counts, count

from vla_dist.evaluation.suite import EpisodeOutcome, SuiteConfig
from vla_dist.run.presets import SHARED_SCENE_TASKS
from vla_dist.run.study import Study, Trained

_OPPOSITES = {("scene/drawer-open", "scene/drawer-close"), ("scene/drawer-close", "scene/drawer-open")}
ROWS = {
    "MT10, training words": "mt10/training",
    "MT10, held-out words": "mt10/held_out",
    "MT10, no words": "mt10/zeroed",
    "scene, training words": "scene/training",
    "scene, held-out words": "scene/held_out",
    "scene, no words": "scene/zeroed",
    "scene, wrong words": "scene/wrong",
    "scene, told to open and closed or the reverse": "scene/opposite",
    "scene, wrong words, did what was said": "scene/obeyed",
}
"""Row of the table -> key of what ``judge_words`` found."""


def judge_words(study: Study, trained: Trained, suite: SuiteConfig) -> tuple[dict[str, Counts], list[EpisodeOutcome]]:
    """Successes and trials by key of ``ROWS``, and the episodes with training words."""
    zeroed = dataclasses.replace(suite, mode="zeroed")
    wrong = dataclasses.replace(suite, tasks=SHARED_SCENE_TASKS, mode="wrong")
    said, silent, contrary = study.judge(trained, suite, zeroed, wrong)
    (reworded,) = study.judge(trained, suite, instructions="held_out")
    opposite = [outcome for outcome in contrary if (outcome.task, outcome.told) in _OPPOSITES]
    found = {
        "mt10/training": count(mt10(said)),
        "mt10/held_out": count(mt10(reworded)),
        "mt10/zeroed": count(mt10(silent)),
        "scene/training": count(scene(said)),
        "scene/held_out": count(scene(reworded)),
        "scene/zeroed": count(scene(silent)),
        "scene/wrong": count(contrary),
        "scene/obeyed": (sum(outcome.obeyed for outcome in contrary), len(contrary)),
    }
    if opposite:
        found["scene/opposite"] = count(opposite)
    return found, said


def scene(outcomes: Sequence[EpisodeOutcome]) -> list[EpisodeOutcome]:
    return [outcome for outcome in outcomes if outcome.task in SHARED_SCENE_TASKS]


def mt10(outcomes: Sequence[EpisodeOutcome]) -> list[EpisodeOutcome]:
    return [outcome for outcome in outcomes if outcome.task not in SHARED_SCENE_TASKS]
