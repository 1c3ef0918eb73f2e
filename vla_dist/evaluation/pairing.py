"""Two versions on the same episodes: what differs is the version, not the luck of the draw."""

from collections.abc import Sequence
from dataclasses import dataclass

from vla_dist.core.errors import DataError
from vla_dist.evaluation.statistics import PairedDifference, paired_difference
from vla_dist.evaluation.suite import EpisodeOutcome


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedComparison:
    """How much better the second version is."""

    overall: PairedDifference
    by_task: dict[str, PairedDifference]


def compare_outcomes(first: Sequence[EpisodeOutcome], second: Sequence[EpisodeOutcome]) -> PairedComparison:
    """Pairs the episodes by task, seed and what was said.

    Raises:
        DataError: the two were not given the same episodes.
    """
    one, two = _by_episode(first), _by_episode(second)
    if one.keys() != two.keys():
        alone = sorted(one.keys() ^ two.keys())
        raise DataError(
            f"{len(alone)} episodes were run by one version alone, {alone[0]} for example; judge both on one suite"
        )
    tasks = list(dict.fromkeys(task for task, _, _ in one))
    return PairedComparison(
        overall=_difference(one, two, list(one)),
        by_task={task: _difference(one, two, [key for key in one if key[0] == task]) for task in tasks},
    )


_Episode = tuple[str, int, str]


def _by_episode(outcomes: Sequence[EpisodeOutcome]) -> dict[_Episode, bool]:
    found = {(outcome.task, outcome.seed, outcome.told): outcome.success for outcome in outcomes}
    if len(found) < len(outcomes):
        raise DataError(f"{len(outcomes)} outcomes are of {len(found)} episodes only; give each episode once")
    return found


def _difference(one: dict[_Episode, bool], two: dict[_Episode, bool], keys: list[_Episode]) -> PairedDifference:
    return paired_difference([one[key] for key in keys], [two[key] for key in keys])
