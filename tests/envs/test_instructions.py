import collections

import pytest

from vla_dist.core.errors import ConfigError, NotFound
from vla_dist.envs.instructions import SPLITS, WORDED_TASKS, instruction_for, phrases

MIRRORED = {
    "scene/drawer-open": "drawer-open",
    "scene/drawer-close": "drawer-close",
    "scene/button-press": "button-press-topdown",
}


@pytest.mark.parametrize("task", WORDED_TASKS)
def test_each_task_has_enough_phrases_and_the_splits_are_disjoint(task: str) -> None:
    training, held_out = phrases(task, "training"), phrases(task, "held_out")
    assert 6 <= len(training) <= 10
    assert 2 <= len(held_out) <= 4
    assert not set(training) & set(held_out)
    for phrase in (*training, *held_out):
        assert phrase == phrase.strip().lower()
        assert len(phrase.split()) >= 3


def test_no_phrase_means_two_tasks_or_is_trained_in_one_and_held_out_in_another() -> None:
    plain = [task for task in WORDED_TASKS if task not in MIRRORED]
    counts = collections.Counter(phrase for task in plain for split in SPLITS for phrase in phrases(task, split))
    assert [phrase for phrase, count in counts.items() if count > 1] == []


@pytest.mark.parametrize(("scene", "plain"), MIRRORED.items())
def test_scene_tasks_use_the_words_of_the_plain_ones(scene: str, plain: str) -> None:
    for split in SPLITS:
        assert phrases(scene, split) == phrases(plain, split)


def test_the_seed_chooses_and_reaches_every_phrase() -> None:
    chosen = [instruction_for("drawer-open", seed, "training") for seed in range(200)]
    assert set(chosen) == set(phrases("drawer-open", "training"))
    assert chosen == [instruction_for("drawer-open", seed, "training") for seed in range(200)]
    held_out = {instruction_for("drawer-open", seed, "held_out") for seed in range(200)}
    assert held_out == set(phrases("drawer-open", "held_out"))


def test_unknown_task_and_split_are_named() -> None:
    with pytest.raises(NotFound, match="no instructions for task 'fly'"):
        instruction_for("fly", 0)
    with pytest.raises(ConfigError, match="'test' must be one of training, held_out"):
        instruction_for("reach", 0, "test")  # type: ignore[arg-type]
