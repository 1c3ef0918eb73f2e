import dataclasses

import pytest

from vla_dist.core.errors import DataError
from vla_dist.evaluation.pairing import compare_outcomes
from vla_dist.evaluation.suite import EpisodeOutcome


def outcomes(**successes):
    return [
        EpisodeOutcome(task=task, told=task, seed=seed, success=bool(success), obeyed=bool(success), num_steps=3)
        for task, row in successes.items()
        for seed, success in enumerate(row)
    ]


def test_episodes_are_paired_by_what_they_were_not_by_their_order():
    first = outcomes(open=[1, 0, 0, 0], close=[1, 1, 0, 0])
    second = outcomes(open=[1, 1, 1, 0], close=[0, 1, 0, 0])
    found = compare_outcomes(first, list(reversed(second)))
    assert found.by_task["open"].mean == 0.5
    assert found.by_task["close"].mean == -0.25
    opened = found.by_task["open"]
    assert (opened.both, opened.only_first, opened.only_second, opened.neither) == (1, 0, 2, 1)
    assert found.overall.mean == pytest.approx(1 / 8)
    assert found.overall.trials == 8


def test_versions_with_other_episodes_are_not_compared():
    first = outcomes(open=[1, 0])
    with pytest.raises(DataError, match="2 episodes were run by one version alone"):
        compare_outcomes(first, outcomes(close=[1, 0], open=[1, 1]))
    with pytest.raises(DataError, match="each episode once"):
        compare_outcomes([*first, dataclasses.replace(first[0], success=False)], first)
